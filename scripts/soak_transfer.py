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
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from bench_updates import Load, server

from titan_bridge.reference import load_reference
from titan_bridge.testing import make_checkpoint
from titan_bridge.transfer import Options, Report, TensorSource, Trainer, TransferError

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 2048}
PROMPT = [(37 * i) % 2000 for i in range(70)]
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


def processes(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def usage(pid: int) -> tuple[float, int]:
    """MB of memory (PSS) and open files of a process and its descendants."""
    memory = files = 0
    for each in processes(pid):
        lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        memory += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        files += len(os.listdir(f"/proc/{each}/fd"))
    return memory / 1024, files


def shared_memory(pid: int) -> set[Path]:
    """Files in /dev/shm that a process and its descendants have mapped."""
    lines = [line for each in processes(pid) for line in Path(f"/proc/{each}/maps").read_text().splitlines()]
    return {
        Path(line[line.index("/dev/shm/") :])
        for line in lines
        if "/dev/shm/" in line and "deleted" not in line
    }


def slope(samples: list[tuple[float, float]]) -> float:
    """MB a minute, of the later three quarters: memory is taken at first."""
    rows = torch.tensor(samples[len(samples) // 4 :], dtype=torch.float64)
    at, size = (rows - rows.mean(0)).T
    return (60 * (at * size).sum() / (at * at).sum()).item()


def cut(trainer: Trainer) -> None:
    next(iter(next(iter(trainer._ways.values())).values())).connection.close()


def garbage(trainer: Trainer) -> None:
    way = next(iter(next(iter(trainer._ways.values())).values()))
    way.connection._socket.send(b"\xff" * 64)


def raising(trainer: Trainer) -> None:
    raise RuntimeError("made to fail")


class Trap(dict):
    """Local tensors; something happens while they are taken for sending."""

    def __init__(self, tensors: dict[str, torch.Tensor], act: Callable[[], None]) -> None:
        super().__init__(tensors)
        self._act, self._left = act, 8

    def __getitem__(self, name: str) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            self._act()
        return super().__getitem__(name)


class Source(TensorSource):
    """What the trainer sends, with a trap for the next update if there is one."""

    act: Callable[[], None] | None = None

    def local(self) -> dict[str, torch.Tensor]:
        act, self.act = self.act, None
        return super().local() if act is None else Trap(super().local(), act)


def soak(url: str, pid: int, reference: Any, minutes: float, every: float) -> dict[str, Any]:
    generator, parameters = torch.Generator().manual_seed(1), dict(reference.model.named_parameters())
    source = Source(parameters, rank=0)
    trainer = Trainer(source, url, options=Options(seconds=LIMIT))
    trainer.send("start")
    asker, load = Asker(url, answer_of(reference)), Load(url, 3)
    kinds = {"whole": 0, "delta": 0, "failed": 0}
    faults = [raising, cut, garbage, None]
    problems, pauses, samples, mine = [], [0.0], [], []
    end, count = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        following = time.monotonic() + every
        kind = ("whole", "delta", "delta", "failed")[count % 4]
        for name, parameter in parameters.items():
            if kind == "whole" or name in ("norm.weight", "layers.0.attention_norm.weight"):
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
        try:
            if kind != "failed":
                send = functools.partial(trainer.send, f"update {count}", whole=kind == "whole")
                report = asker.update(send, answer_of(reference))
                pauses.append(report.pause)
                done: str = report.kind
            elif (fault := faults[count // 4 % len(faults)]) is not None:
                source.act = functools.partial(fault, trainer)
                done = trainer.send("never", whole=True).kind
            else:
                with Trainer(parameters, url, options=Options(seconds=LIMIT)) as other:
                    done = other.send("intruder").kind
        except TransferError:
            done = "failed"
        kinds[done] += 1
        if (done == "failed") != (kind == "failed"):
            problems.append(f"update {count} was to be {kind} and was {done}")
        memory, files = usage(pid)
        samples.append((time.monotonic(), memory))
        mine.append((time.monotonic(), usage(os.getpid())[0] - memory))
        count += 1
        if count == 8:
            files_before = files
        time.sleep(max(0, following - time.monotonic()))
    trainer.send("last")
    trainer.verify()
    asker.stop()
    load.stop()
    trainer.close()
    time.sleep(1)
    return {
        "updates": kinds,
        "answers": asker.asked,
        "farthest_answer": asker.farthest,
        "tokens": len(load.tokens),
        "longest_gap": load.of([(0, float("inf"))])["longest_gap"],
        "longest_commit": max(pauses),
        "server_mb": samples[-1][1],
        "server_mb_a_minute": slope(samples),
        "trainer_mb_a_minute": slope(mine),
        "files_of_the_server": [files_before if count > 8 else 0, files],
        "problems": [*problems, *asker.wrong],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=5, help="seconds from one update to the next")
    parser.add_argument("--serve", default="--tp 2", help="options of the server")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="titan-") as name:
        folder = Path(name)
        model = make_checkpoint(folder / "m", "qwen3", tie_word_embeddings=False, **SIZES)
        options = ["--dtype", "float32", *given.serve.split()]
        with server(model, folder, options) as url, torch.no_grad():
            (pid,) = [each for each in processes(os.getpid())[1:] if "serve" in _command(each)][:1]
            result = soak(url, pid, load_reference(model), given.minutes, given.every)
            started, segments = processes(pid), shared_memory(pid)
        end = time.monotonic() + 10
        while (left := [each for each in started if _command(each)]) and time.monotonic() < end:
            time.sleep(0.1)
        left += [each for each in segments if each.exists()]
    if left:
        result["problems"].append(
            f"left: {[f'{each} {_command(each)}' if isinstance(each, int) else each for each in left]}"
        )
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        for key, value in result.items():
            print(f"{key.replace('_', ' '):22} {value}")
    sys.exit(bool(result["problems"]))


def _command(pid: int) -> str:
    """Empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


if __name__ == "__main__":
    main()
