"""Throughput and start-up of TorchTitan's classes in vLLM, as a ratio to vLLM's own model.

Each case starts both engines in turn, several times, with the same flags, the same random weights and the same
prompts; the table gives medians and the ratio ours / theirs (above 1: ours is faster).

    python scripts/bench_serve.py                          all cases
    python scripts/bench_serve.py --case dense-eager-tp1   one
    python scripts/bench_serve.py --json out/serve.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from titan_bridge import cpu

DENSE = {
    "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": False,
}  # fmt: skip
"""About 0.2 B parameters."""
MOE = {
    "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 512,
    "num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
}  # fmt: skip
"""About 0.15 B parameters."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One engine of a comparison."""

    impl: str
    ep: bool = False

    def __str__(self) -> str:
        return self.impl + (" ep" if self.ep else "")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two engines on one model; the ratio is `ours / theirs`."""

    model: str
    tp: int
    eager: bool
    batch: int = 8
    ours: Side = field(default_factory=lambda: Side(impl="torchtitan"))
    theirs: Side = field(default_factory=lambda: Side(impl="vllm"))


CASES = {
    "dense-eager-tp1": Case(model="dense", tp=1, eager=True),
    "dense-compiled-tp1": Case(model="dense", tp=1, eager=False),
    "dense-eager-tp2": Case(model="dense", tp=2, eager=True),
    "dense-compiled-tp2": Case(model="dense", tp=2, eager=False),
    "moe-eager-tp2": Case(model="moe", tp=2, eager=True, batch=16),
    "moe-compiled-tp2": Case(model="moe", tp=2, eager=False, batch=16),
    "moe-ep-against-tp": Case(
        model="moe", tp=2, eager=True, batch=16,
        ours=Side(impl="torchtitan", ep=True), theirs=Side(impl="torchtitan"),
    ),
}  # fmt: skip

PREFILL_TOKENS = 256
DECODE_TOKENS = 64


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; all without it")
    parser.add_argument("--starts", type=int, default=3, help="engines started a side (default 3)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements an engine (default 3)")
    parser.add_argument("--models", type=Path, default=Path("out/bench"), help="where the models are made")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _measure(json.loads(args.worker))
    rows = []
    console = Console(width=None if sys.stdout.isatty() else 140)
    for name in args.case or CASES:
        row = _case(name, CASES[name], args)
        rows.append(row)
        console.print(_table([row]))
    if len(rows) > 1:
        console.print(_table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": _machine(), "rows": rows}, indent=1))
    return 0


def _case(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    model = _model(args.models, case.model)
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for start in range(args.starts):
        for which in ("ours", "theirs") if start % 2 == 0 else ("theirs", "ours"):
            side: Side = getattr(case, which)
            found[which] += _run(model, case, side, args.repeats)
            print(f"{name}: {side}: {found[which][-1]}", file=sys.stderr)
    row: dict[str, Any] = {
        "case": name,
        **{k: str(v) for k, v in asdict(case).items() if k not in ("ours", "theirs")},
    }
    row |= {"ours": str(case.ours), "theirs": str(case.theirs), "samples": len(found["ours"])}
    for figure in ("prefill", "decode", "start"):
        ours, theirs = (statistics.median(f[figure] for f in found[which]) for which in ("ours", "theirs"))
        row[figure] = {
            "ours": ours,
            "theirs": theirs,
            "ratio": theirs / ours if figure == "start" else ours / theirs,
        }
    return row


def _run(model: Path, case: Case, side: Side, repeats: int) -> list[dict[str, float]]:
    """Start one engine in a process of its own and measure it."""
    job = {
        "options": {
            "model": str(model), "model_impl": side.impl, "tensor_parallel_size": case.tp, "dtype": "bfloat16",
            "enable_expert_parallel": side.ep, "enforce_eager": case.eager, "max_model_len": 512,
            "max_num_seqs": case.batch, "max_num_batched_tokens": 2048, "enable_prefix_caching": False,
            "worker_extension_cls": "titan_bridge.engine.run.worker.BridgeWorker", "skip_tokenizer_init": True,
        },
        "batch": case.batch,
        "repeats": repeats,
    }  # fmt: skip
    environment = {**os.environ, **cpu.environment(case.tp, given=os.environ), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log, answer = Path(folder, "log"), Path(folder, "answer.json")
        with log.open("w") as output:
            done = subprocess.run(
                [sys.executable, __file__, "--worker", json.dumps({**job, "answer": str(answer)})],
                env=environment, stdout=output, stderr=output, check=False,
            )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{side} failed:\n{log.read_text()[-4000:]}")
        return json.loads(answer.read_text())


def _measure(job: Mapping[str, Any]) -> int:
    # The engine is only imported in the process that runs it.
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    started = time.perf_counter()
    llm = LLM(**job["options"])
    start = time.perf_counter() - started
    loaded = {worker["model_class"] for worker in llm.collective_rpc("bridge_report")}
    ours = job["options"]["model_impl"] == "torchtitan"
    assert all(name.startswith("titan_bridge.") == ours for name in loaded), loaded

    def generate(prompt_tokens: int, new: int, seed: int) -> float:
        batch = job["batch"]
        prompts = [
            {"prompt_token_ids": [(seed + 7 * i + 3 * j) % 31_000 for j in range(prompt_tokens)]}
            for i in range(batch)
        ]
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began

    generate(PREFILL_TOKENS, 8, 0)
    rows = []
    for repeat in range(job["repeats"]):
        first = generate(PREFILL_TOKENS, 1, repeat)
        short = generate(8, 1, repeat)
        whole = generate(8, DECODE_TOKENS + 1, repeat)
        rows.append(
            {
                "prefill": job["batch"] * PREFILL_TOKENS / first,
                "decode": job["batch"] * DECODE_TOKENS / (whole - short),
                "start": start,
            }
        )
    Path(job["answer"]).write_text(json.dumps(rows))
    return 0


def _model(folder: Path, kind: str) -> Path:
    import torch  # noqa: PLC0415  the parent needs it only to make a model

    from titan_bridge.testing import make_checkpoint  # noqa: PLC0415

    path = folder / f"serve-{kind}"
    if not (path / "config.json").is_file():
        family, sizes = ("qwen3", DENSE) if kind == "dense" else ("qwen3_moe", MOE)
        make_checkpoint(path, family, dtype=torch.bfloat16, std=0.02, tokenizer=False, **sizes)
    return path


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"ours / theirs, medians; bf16; {_machine()}")
    for column in (
        "case",
        "ours",
        "theirs",
        "prefill tok/s",
        "ratio",
        "decode tok/s",
        "ratio",
        "start s",
        "ratio",
    ):
        table.add_column(column)
    for row in rows:
        cells = [row["case"], row["ours"], row["theirs"]]
        for figure in ("prefill", "decode", "start"):
            f = row[figure]
            cells += [f"{f['ours']:,.1f} / {f['theirs']:,.1f}", f"{f['ratio']:.2f}"]
        table.add_row(*cells)
    return table


def _machine() -> str:
    return f"{len(cpu.cores())} cores, {platform.processor() or platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())
