"""The models that are compiled as for a GPU, and the processes that do it: `static_replay.py`, one for each rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from titan_bridge import cpu
from titan_bridge.ports import free_port
from titan_bridge.testing import make_checkpoint

SERVABLE = {"hidden_size": 256, "head_dim": 32}  # vLLM's CPU attention has no kernel for a head_dim of 16
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    # family, config fields, whether a CUDA graph holds the routed experts
    "llama3": ("llama3", SERVABLE, False),
    "qwen3": ("qwen3", {}, False),
    "qwen3_moe": ("qwen3_moe", {}, False),
    "qwen3_moe, experts captured": ("qwen3_moe", {}, True),
    "deepseek_v3": ("deepseek_v3", {"first_k_dense_replace": 0}, False),
    "gpt_oss": ("gpt_oss", {}, False),
}
DENSE = ("llama3", "qwen3")


def make_models(folder: Path) -> dict[str, str]:
    """A checkpoint of each family."""
    return {
        family: str(make_checkpoint(folder / family, family, tokenizer=False, **fields))  # type: ignore[arg-type]
        for family, fields, _ in CASES.values()
    }


def replay(cases: list[dict[str, Any]], folder: Path, ranks: int = 1) -> dict[str, dict[str, Any]]:
    """What `static_replay.py` found for each case; one process a rank, so that vLLM is imported once."""
    options = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCHINDUCTOR_DEBUG_COMPILE": "1",  # C++ that is compiled quickly: nothing here asks how fast it runs
        cpu.BIND: "nobind",
    }
    if ranks > 1:
        options |= {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "VLLM_DIST_IDENT": f"titan-{os.getpid()}",
        }
        cases = [case | {"port": free_port()} for case in cases]
    command = [sys.executable, "-m", "tests.engine.static_replay", json.dumps(cases)]
    started = []
    for rank in range(ranks):
        errors = (folder / f"errors-{ranks}-{rank}").open("w+")
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        environment = {**os.environ, **options, **place}
        started.append(
            (
                subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
                ),
                errors,
            )
        )
    try:
        said = started[0][0].communicate()[0]
    finally:
        for process, errors in started:
            process.kill()  # a rank whose other has failed waits for it
            process.wait()
            errors.seek(0)
            print(errors.read()[-4000:])
    return {
        found["name"]: found
        for line in said.splitlines()
        if line.startswith("{")
        for found in [json.loads(line)]
    }


def cases_of(models: dict[str, str], names: Iterable[str], axis: str = "tp") -> list[dict[str, Any]]:
    return [
        {"name": name, "model": models[family], "captures": captures}
        | {"experts": family not in DENSE, "axis": axis}
        for name in names
        for family, _, captures in [CASES[name]]
    ]


def pieces_of(name: str) -> int:
    """Of a graph of two layers: attention stands between two, and so do experts that are not captured."""
    family, _, captured = CASES[name]
    return 2 * (2 if captured or family in DENSE else 4) + 1


def farthest(rows: list[Any], others: list[Any]) -> float:
    """Between the log-probabilities of two runs, which have chosen the same tokens."""
    worst = 0.0
    for (ids, logprobs), (other_ids, other_logprobs) in zip(rows, others, strict=True):
        assert ids == other_ids
        worst = max(worst, *(abs(a - b) for a, b in zip(logprobs, other_logprobs, strict=True)))
    return worst
