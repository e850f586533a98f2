"""Start `titan-bridge serve`, ask it over HTTP, and stop it.

    python scripts/examples/serve_and_ask.py DIR --prompt "def main(" --tp 2 --enforce-eager

A TOML file brings prompts of its own. Options that are not listed go to `titan-bridge serve`.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from titan_bridge.config.reader import resolve
from titan_bridge.config.schema import InferConfig
from titan_bridge.ports import free_port


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="what `titan-bridge serve` takes")
    parser.add_argument("--prompt", action="append", help="may be repeated")
    parser.add_argument("--log", type=Path, default=Path("server.log"), help="of the server")
    given, options = parser.parse_known_args()
    toml = {"file": given.model} if given.model.endswith(".toml") else {"flags": {"model": given.model}}
    said = resolve(InferConfig, **toml).config.generate
    body = {name: getattr(said, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    url = f"http://127.0.0.1:{free_port()}"
    serve = [sys.executable, "-m", "titan_bridge.cli", "serve", given.model, "--port", url.split(":")[2]]
    with given.log.open("w") as log:  # a process group of its own: its workers end with it
        server = subprocess.Popen([*serve, *options], stdout=log, stderr=log, process_group=0)
    try:
        while not up(url):
            if server.poll() is not None:
                sys.exit(given.log.read_text()[-3000:])
            time.sleep(0.5)
        for prompt in given.prompt or said.prompts:
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": prompt, **body}, timeout=60)
            print(f"--- {prompt!r}\n{answer.raise_for_status().json()['choices'][0]['text']}")
        server.send_signal(signal.SIGINT)
        return server.wait(60)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


def up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
