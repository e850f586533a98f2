"""Start `titan-bridge serve`, ask it over HTTP, and stop it.

    python scripts/examples/serve_and_ask.py DIR --prompt "def main(" --tp 2 --enforce-eager
    python scripts/examples/serve_and_ask.py configs/infer/qwen3_moe_tp2_ep2.toml    # with the file's prompts

Options that are not listed here go to `titan-bridge serve`.
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
from titan_bridge.config.schema import Generate, InferConfig
from titan_bridge.ports import free_port


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="what `titan-bridge serve` takes")
    parser.add_argument("--prompt", action="append", help="may be repeated")
    parser.add_argument("--log", type=Path, default=Path("out/serve_and_ask.log"), help="the server's words")
    given, options = parser.parse_known_args()
    said = (
        resolve(InferConfig, file=given.model).config.generate
        if given.model.endswith(".toml")
        else Generate()
    )
    sampling = {name: getattr(said, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    port = str(free_port())
    serve = [sys.executable, "-m", "titan_bridge.cli", "serve", given.model, "--port", port, *options]
    given.log.parent.mkdir(parents=True, exist_ok=True)
    with given.log.open("w") as log:  # a process group of its own: its workers end with it
        server = subprocess.Popen(serve, stdout=log, stderr=log, process_group=0)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while not up(client):
                if server.poll() is not None:
                    print(given.log.read_text()[-3000:], file=sys.stderr)
                    return 1
                time.sleep(0.5)
            model = client.get("/v1/models").json()["data"][0]["id"]
            for prompt in given.prompt or said.prompts:
                answer = client.post("/v1/completions", json={"model": model, "prompt": prompt, **sampling})
                print(f"--- {prompt!r}\n{answer.raise_for_status().json()['choices'][0]['text']}")
        print("---")
        server.send_signal(signal.SIGINT)
        return server.wait(60)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


def up(client: httpx.Client) -> bool:
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
