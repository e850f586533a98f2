"""What a server's users feel of weight updates: tokens a second, and the longest gap between two tokens of a request.

    python scripts/bench_updates.py            a table
    python scripts/bench_updates.py --json     for machines
    python scripts/bench_updates.py --pause keep_cache    requests in flight keep what they have cached
    python scripts/bench_updates.py --family qwen3_moe --serve "--dp 2 --ep 2" --updates 50    ranks in lockstep

A server of a random model on this machine, a steady load of streaming requests, and a trainer that sends all weights
again and again. In turn: nothing; an update, from the call of `send` to its return; a busy core; and a reload by vLLM's
own `reload_weights`, from a file in memory, for which the engine stands still. Trainer, load, server and engine share
the cores: "a busy core" says how much of an update's effect is the machine's share; nothing is sent, but one thread
copies memory for as long.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from titan_bridge.ports import free_port
from titan_bridge.testing import make_checkpoint
from titan_bridge.transfer import Options, Trainer
from titan_bridge.transfer.options import PauseMode

SIZES = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 8192}


class Load:
    """Requests that stream, one after the other, from several users at once."""

    def __init__(self, url: str, users: int) -> None:
        self._url, self._go = url, True
        self._tokens = [(array("d"), array("d")) for _ in range(users)]
        """Of each user: when its tokens came, and how long after the one before in their request, or 0."""
        self._threads = [threading.Thread(target=self._user, args=each, daemon=True) for each in self._tokens]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._go = False
        for thread in self._threads:
            thread.join()

    def _user(self, came: array[float], gaps: array[float]) -> None:
        body = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=self._url, timeout=120) as http:
            while self._go:
                last = None
                with http.stream("POST", "/v1/completions", json=body) as stream:
                    for line in stream.iter_lines():
                        if not self._go:
                            return
                        if line.startswith("data: {"):
                            now = time.monotonic()
                            gaps.append(0 if last is None else now - last)
                            came.append(now)
                            last = now

    @property
    def tokens(self) -> int:
        return sum(len(came) for came, _ in self._tokens)

    def of(self, spans: list[tuple[float, float]]) -> dict[str, float]:
        """Tokens a second, and the longest gap between two of a request in seconds, within some spans of time."""
        rows = [row for came, gaps in self._tokens for row in zip(came, gaps, strict=False)]
        count = sum(any(a <= at < b for a, b in spans) for at, _ in rows)
        longest = max(
            (gap for at, gap in rows if gap and any(at - gap < b and at > a for a, b in spans)), default=0
        )
        return {"tokens_per_second": count / sum(b - a for a, b in spans), "longest_gap": longest}


@contextlib.contextmanager
def server(model: Path, folder: Path, options: list[str]) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "titan_bridge.cli", "serve", str(model), "--port", str(port)]
    command += ["--served-model-name", "m", "--enforce-eager", "--max-model-len", "512"]
    command += ["--weight-transfer-config", json.dumps({"backend": "titan"}), *options]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit((folder / "server.log").read_text()[-2000:])
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").is_success:
                    break
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait()


def measure(
    family: Any, options: list[str], users: int, updates: int, seconds: float, pause: PauseMode
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="titan-", dir="/dev/shm") as name:
        folder = Path(name)
        model = make_checkpoint(folder / "m", family, dtype=torch.bfloat16, **SIZES)
        held = load_file(model / "model.safetensors")
        with (
            server(model, folder, options) as url,
            Trainer(held, url, options=Options(delta=False, pause=pause)) as trainer,
        ):
            trainer.send()  # connects
            load = Load(url, users)
            time.sleep(5)
            rows: dict[str, Any] = {}
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
            post = httpx.Client(timeout=300).post
            reports = []
            actions = {
                "nothing": lambda: time.sleep(seconds),
                "updates": lambda: reports.append(trainer.send()),
                "a busy core": lambda: _busy(reports[-1].seconds),
                "reload": lambda: post(f"{url}/collective_rpc", json=body).raise_for_status(),
            }
            spans: dict[str, list[tuple[float, float]]] = {what: [] for what in actions}
            for _ in range(updates):
                for what, action in actions.items():  # in turn, since a machine's other work comes and goes
                    time.sleep(2)  # what the one before has left behind: requests that compute anew
                    started = time.monotonic()
                    action()
                    spans[what].append((started, time.monotonic()))
            trainer.send()
            rows["compared"] = trainer.verify()
            load.stop()
            for what, each in spans.items():
                rows[what] = {**load.of(each), "seconds_each": sum(b - a for a, b in each) / len(each)}
            rows["longest_commit"] = max(report.pause for report in reports)
            rows["bytes"] = reports[0].lower_bound
    return rows


def _busy(seconds: float) -> None:
    """As busy as a trainer that copies."""
    a, b, end = torch.ones(1 << 24), torch.ones(1 << 24), time.monotonic() + seconds
    while time.monotonic() < end:
        b.copy_(a)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", default="qwen3")
    parser.add_argument("--serve", default="", help='options of the server, such as "--dp 2 --ep 2"')
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.5, help="how long nothing is watched, each time")
    parser.add_argument("--pause", choices=get_args(PauseMode), default="keep", help="see Options.pause")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(given.family, given.serve.split(), given.users, given.updates, given.seconds, given.pause)
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("", "tokens/s", "of nothing", "longest gap ms", "seconds each")
    for what, row in rows.items():
        if isinstance(row, dict):
            speed = row["tokens_per_second"]
            table.add_row(
                what,
                f"{speed:.1f}",
                f"{speed / rows['nothing']['tokens_per_second']:.2f}",
                f"{row['longest_gap'] * 1e3:.0f}",
                f"{row['seconds_each']:.2f}",
            )
    Console(width=120).print(table)
    print(
        f"{given.updates} updates of {rows['bytes'] / 1e6:.0f} MB; "
        f"longest commit {rows['longest_commit'] * 1e3:.0f} ms; "
        f"{rows['compared']} tensors of workers compared afterwards, all equal"
    )


if __name__ == "__main__":
    main()
