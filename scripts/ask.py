"""Start `titan-bridge serve` for a file of configs/infer/, send it the prompts of that file over HTTP, and stop it.

    python scripts/ask.py configs/infer/qwen3_moe_tp2_ep2.toml

What the server says goes to LOG (--log); its last lines are printed if it fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from titan_bridge.config.reader import resolve
from titan_bridge.config.schema import Generate, InferConfig

START_SECONDS = 300
STOP_SECONDS = 60


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="a TOML file for inference")
    parser.add_argument("--log", type=Path, default=Path("out/ask.log"))
    arguments = parser.parse_args()
    config = resolve(InferConfig, file=arguments.file).config
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "titan_bridge.cli", "serve", arguments.file, "--port", str(port)]
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    with arguments.log.open("w") as log:
        server = subprocess.Popen(
            [*command, "--served-model-name", "demo"],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            process_group=0,  # so that its workers can be ended with it
        )
    try:
        url = f"http://127.0.0.1:{port}"
        if not up(server, url):
            print("".join(arguments.log.read_text().splitlines(keepends=True)[-20:]), file=sys.stderr)
            return 1
        for prompt in config.generate.prompts:
            print(f"--- {prompt!r}\n{continuation(url, prompt, config.generate)}")
        print("---")
        server.send_signal(signal.SIGINT)
        return 0 if server.wait(STOP_SECONDS) == 0 else 1
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def up(server: subprocess.Popen[bytes], url: str) -> bool:
    """Wait until the server answers; False if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False


def continuation(url: str, prompt: str, sampling: Generate) -> str:
    """What the server writes after `prompt`."""
    values = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(values).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=STOP_SECONDS) as answer:
        return json.load(answer)["choices"][0]["text"]


if __name__ == "__main__":
    sys.exit(main())
