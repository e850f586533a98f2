"""Minutes of random requests over HTTP to a server with attention groups, while it gets new weights.

    python scripts/soak_attention_dp.py                                 10 minutes, a mixture of experts at dp=2 tp=2
    python scripts/soak_attention_dp.py --minutes 1 --serve "--tp 2 --attention-dp" --family qwen3 --json

Users ask with random lengths, half of them with a shared prefix, and the cache is small enough that some requests push
out others; a quarter of the users hang up after some tokens. Every few seconds a trainer sends new weights, and after
every fifth update the server is told to abort everything. Any other answer must have all the tokens that were asked
for. Exits with 1 on an answer that has not, on requests that are left when nobody asks any more, on weights that differ
from the trainer's, and on a process or shared memory that outlives the server.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from bench_updates import server
from soak_transfer import memory, shared_memory, slopes, tree

from titan_bridge.reference import load_reference
from titan_bridge.testing import make_checkpoint
from titan_bridge.transfer import Options, Trainer

SIZES = {"num_key_value_heads": 1, "num_hidden_layers": 3}
SMALL = (
    "--max-num-seqs", "8", "--max-num-batched-tokens", "128", "--block-size", "32", "--num-gpu-blocks-override", "24",
)  # fmt: skip


class Users:
    """Threads that ask, one request after the other."""

    def __init__(self, url: str, count: int) -> None:
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.aborts = self.aborted = 0
        """How often the server was told to abort everything, and how often it had done so."""
        self._url, self._go = url, True
        self._pool = ThreadPoolExecutor(count)
        self._asking = [self._pool.submit(self._ask, seed) for seed in range(count)]

    def stop(self) -> None:
        self._go = False
        for each in self._asking:
            each.result()

    def _ask(self, seed: int) -> None:
        chance = random.Random(seed)
        shared = list(range(10, 106))
        with httpx.Client(base_url=self._url, timeout=300) as http:
            while self._go:
                own = [chance.randrange(3, 700) for _ in range(chance.randrange(1, 150))]
                prompt = shared + own if chance.random() < 0.5 else own
                try:
                    self._one(http, prompt, chance.randrange(1, 120), leaves=chance.random() < 0.25)
                except httpx.HTTPError as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")

    def _one(self, http: httpx.Client, prompt: list[int], tokens: int, *, leaves: bool) -> None:
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        came, reason, before = 0, None, self.aborted
        with http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                came, reason = came + 1, choice["finish_reason"]
                if leaves and came > tokens // 3:
                    self.seen["disconnected"] += 1
                    return
        # What is aborted before its first token streams nothing, not even a reason.
        if self.aborts > before and (reason == "abort" or not came):
            self.seen["aborted"] += 1
        elif reason == "length":
            self.seen["finished"] += 1
        else:
            self.wrong.append(f"{came} tokens of {tokens}, then {answer.status_code} {reason}")


def soak(url: str, process: psutil.Process, reference: Any, minutes: float, every: float) -> dict[str, Any]:
    parameters = dict(reference.model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    users = Users(url, 12)
    me, samples = psutil.Process(), []
    updates = 0
    end = time.monotonic() + 60 * minutes
    with Trainer(parameters, url, options=Options(seconds=60)) as trainer:
        while time.monotonic() < end:
            following = time.monotonic() + every
            for parameter in parameters.values():
                parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator))
            trainer.send(f"update {updates}")
            updates += 1
            if updates % 5 == 0:
                users.aborts += 1
                httpx.post(f"{url}/pause?mode=abort", timeout=300).raise_for_status()
                httpx.post(f"{url}/resume", timeout=300).raise_for_status()
                users.aborted += 1
            samples.append((time.monotonic(), memory(me, tree(process.pid))))
            time.sleep(max(0.0, following - time.monotonic()))
        trainer.verify()
    users.stop()
    left = -1.0
    for _ in range(100):  # who hung up last is noticed a little later
        left = metric(url, "num_requests_running") + metric(url, "num_requests_waiting")
        if not left:
            break
        time.sleep(0.1)
    return {
        "requests": dict(users.seen),
        "updates": updates,
        "aborts_of_everything": users.aborts,
        "preemptions": metric(url, "num_preemptions_total"),
        "prefix_hits": metric(url, "prefix_cache_hits_total"),
        "mb_at_last": {name: round(size) for name, size in samples[-1][1].items()},
        "mb_a_minute": slopes(samples),
        "problems": users.wrong + ([f"{left:.0f} requests are left"] if left else []),
    }


def metric(url: str, name: str) -> float:
    rows = httpx.get(f"{url}/metrics", timeout=60).text
    return sum(float(value) for value in re.findall(rf"^vllm:{name}{{.*}} (\S+)$", rows, re.MULTILINE))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=5, help="seconds from one update to the next")
    parser.add_argument("--serve", default="--dp 2 --tp 2 --ep 4 --attention-dp --api-server-count 1")
    parser.add_argument("--family", default="qwen3_moe")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="titan-") as name:
        folder = Path(name)
        model = make_checkpoint(folder / "m", given.family, **SIZES)
        options = ["--dtype", "float32", *SMALL, *given.serve.split()]
        with server(model, folder, options) as url, torch.no_grad():
            (process,) = psutil.Process().children()
            result = soak(url, process, load_reference(model), given.minutes, given.every)
            started = tree(process.pid)
            segments = shared_memory(started)
    _, left = psutil.wait_procs(started, timeout=10)
    result["problems"] += [f"left: {each}" for each in (*left, *(path for path in segments if path.exists()))]
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        for key, value in result.items():
            print(f"{key.replace('_', ' '):22} {value}")
    return bool(result["problems"])


if __name__ == "__main__":
    raise SystemExit(main())
