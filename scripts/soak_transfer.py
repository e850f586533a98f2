"""Hours of updates in minutes: a server under load, an update every few seconds, one in four made to fail.

    python scripts/soak_transfer.py                      10 minutes at tp=2
    python scripts/soak_transfer.py --minutes 1 --every 1 --json

In turn: a whole update, a delta, a delta, and one that fails (a trainer that raises while it sends, a connection that
is cut, garbage on it, a second trainer). Three users stream; a fourth asks one long prompt again and again, whose
answer tells which weights made it: its log-probabilities must be those of TorchTitan's forward with the weights of an
update that was live between question and answer. Exits with 1 on a wrong answer, on an update that should have
failed or not, on weights that differ at the end, and on a process, shared memory or open files that are left.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from bench_updates import Load, server

from titan_bridge.reference import load_reference
from titan_bridge.testing import make_checkpoint
from titan_bridge.testing_samples import TrappedSource
from titan_bridge.transfer import Options, Report, Trainer, TransferError

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 2048}
PROMPT = [(37 * i) % 2000 for i in range(70)]
SMALL = ("norm.weight", "layers.0.attention_norm.weight")
TOP, CLOSE = 5, 2e-3
LIMIT = 20.0


class Asker:
    """Asks which weights are served, and remembers when each update may have become live."""

    def __init__(self, url: str, now: list[float]) -> None:
        self.wrong: list[str] = []
        self.asked, self.farthest = 0, 0.0
        self._url, self._go, self._lock = url, True, threading.Lock()
        self._lives = [[0.0, float("inf"), now]]
        """From when and until when at most, and the answer."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def update(self, send: Callable[[], Report], answer: list[float]) -> Report:
        """`send`, which brings in weights with this answer."""
        with self._lock:
            self._lives.append([time.monotonic(), float("inf"), answer])
        report = send()
        with self._lock:
            self._lives[-2][1] = time.monotonic()
            self._lives = self._lives[-4:]
        return report

    def stop(self) -> None:
        self._go = False
        self._thread.join()

    def _run(self) -> None:
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": TOP}
        body["return_tokens_as_token_ids"] = True  # else tokens with one text are one
        with httpx.Client(base_url=self._url, timeout=120) as http:
            while self._go:
                started = time.monotonic()
                choice = http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]
                ended = time.monotonic()
                got = sorted(choice["logprobs"]["top_logprobs"][0].values())[-TOP:]
                with self._lock:
                    lives = [life for life in self._lives if life[0] <= ended and life[1] >= started]
                off = [max(abs(a - b) for a, b in zip(got, life[2], strict=True)) for life in lives]
                self.asked += 1
                self.farthest = max(self.farthest, min(off))
                if min(off) > CLOSE:
                    self.wrong.append(f"answer {self.asked} is {min(off):.1e} from the nearest that was live")


def answer_of(reference: Any) -> list[float]:
    return reference.logprobs(PROMPT)[-1].topk(TOP).values.flip(0).tolist()


def tree(pid: int) -> list[psutil.Process]:
    """A process and its descendants."""
    return [found := psutil.Process(pid), *found.children(recursive=True)]


def memory(trainer: psutil.Process, server: list[psutil.Process]) -> dict[str, float]:
    """MB of the trainer and each process of the server, without files: those are shared with whatever else runs."""
    named = {"trainer": trainer, "server": server[0]}
    named |= {f"{Path(each.cmdline()[0]).name} {each.pid}": each for each in server[1:]}
    own = ("[", "/memfd:", "/dev/shm/")
    return {
        name: sum(part.pss for part in each.memory_maps() if part.path.startswith(own)) / 2**20
        for name, each in named.items()
    }


def shared_memory(processes: list[psutil.Process]) -> set[Path]:
    """Files in /dev/shm that they have mapped."""
    paths = [each.path for process in processes for each in process.memory_maps()]
    return {Path(path) for path in paths if path.startswith("/dev/shm/") and "deleted" not in path}


def slopes(samples: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """MB a minute of each process, of the later two thirds: memory is taken at first."""
    rows = samples[len(samples) // 3 :]
    at = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    at -= at.mean()
    sizes = {name: torch.tensor([row[1][name] for row in rows], dtype=torch.float64) for name in rows[0][1]}
    return {name: round((60 * (at * size).sum() / (at * at).sum()).item(), 2) for name, size in sizes.items()}


def cut(trainer: Trainer) -> None:
    next(iter(trainer._ways.values())).connection.close()


def garbage(trainer: Trainer) -> None:
    way = next(iter(trainer._ways.values()))
    way.connection._socket.send(b"\xff" * 64)


def raising(trainer: Trainer) -> None:
    raise RuntimeError("made to fail")


def soak(
    url: str, server: psutil.Process, reference: Any, minutes: float, every: float, kinds: list[str]
) -> dict[str, Any]:
    generator, parameters = torch.Generator().manual_seed(1), dict(reference.model.named_parameters())
    source = TrappedSource(parameters, rank=0)
    trainer = Trainer(source, url, options=Options(seconds=LIMIT))
    trainer.send("start")
    asker, load = Asker(url, answer_of(reference)), Load(url, 3)
    while load.tokens < 100:  # an engine's first steps are slow
        time.sleep(0.1)
    done = dict.fromkeys(("whole", "delta", "failed", "none"), 0)
    faults = [raising, cut, garbage, None]
    problems, pauses, samples, files = [], [0.0], [], []
    me, began, count = psutil.Process(), time.monotonic(), 0
    while time.monotonic() < began + 60 * minutes:
        following = time.monotonic() + every
        kind = kinds[count % len(kinds)]
        for name, parameter in parameters.items():
            if kind == "whole" or (kind != "none" and name in SMALL):
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
        became = kind
        try:
            if kind == "failed":
                fault = faults[done["failed"] % len(faults)]
                if fault is not None:
                    source.act = functools.partial(fault, trainer)
                    became = trainer.send("never", whole=True).kind
                else:
                    with Trainer(parameters, url, options=Options(seconds=LIMIT)) as other:
                        became = other.send("intruder").kind
            elif kind != "none":
                send = functools.partial(trainer.send, f"update {count}", whole=kind == "whole")
                report = asker.update(send, answer_of(reference))
                pauses.append(report.pause)
                became = report.kind
        except TransferError:
            became = "failed"
        done[became] += 1
        if became != kind:
            problems.append(f"update {count} was to be {kind} and was {became}")
        samples.append((time.monotonic(), memory(me, tree(server.pid))))
        files.append(sum(each.num_fds() for each in (me, *tree(server.pid))))
        count += 1
        time.sleep(max(0, following - time.monotonic()))
    asker.update(functools.partial(trainer.send, "last"), answer_of(reference))
    trainer.verify()
    asker.stop()
    load.stop()
    trainer.close()
    time.sleep(1)
    return {
        "updates": done,
        "answers": asker.asked,
        "farthest_answer": asker.farthest,
        **load.of([(began, time.monotonic())]),
        "longest_commit": max(pauses),
        "mb_at_last": {name: round(size) for name, size in samples[-1][1].items()},
        "mb_a_minute": slopes(samples),
        "open_files": [files[len(files) // 3], files[-1]],
        "problems": [*problems, *asker.wrong],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=5, help="seconds from one update to the next")
    parser.add_argument(
        "--kinds", default="whole,delta,delta,failed", help='what is done in turn; also "none"'
    )
    parser.add_argument("--serve", default="--tp 2", help="options of the server")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="titan-") as name:
        folder = Path(name)
        model = make_checkpoint(folder / "m", "qwen3", tie_word_embeddings=False, **SIZES)
        options = ["--dtype", "float32", *given.serve.split()]
        with server(model, folder, options) as url, torch.no_grad():
            (process,) = psutil.Process().children()
            reference = load_reference(model)
            result = soak(url, process, reference, given.minutes, given.every, given.kinds.split(","))
            started = tree(process.pid)
            segments = shared_memory(started)
        _, left = psutil.wait_procs(started, timeout=10)
        if left or (left := [each for each in segments if each.exists()]):
            result["problems"].append(f"left: {left}")
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        for key, value in result.items():
            print(f"{key.replace('_', ' '):16} {value}")
    sys.exit(bool(result["problems"]))


if __name__ == "__main__":
    main()
