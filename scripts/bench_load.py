"""Start-up time of the weights: "titan" load format against vLLM's default loader, on the same checkpoint.

    python scripts/bench_load.py                     1 GB of Qwen3 in bfloat16 at tp=1 and tp=2, made on the spot
    python scripts/bench_load.py --family llama3     whose rotary order differs between the formats
    python scripts/bench_load.py --cache cold        files dropped from the page cache before each start
    python scripts/bench_load.py --json out/load.json

Each start is an engine of its own; the two take turns. The seconds are measured inside every worker, around the same
two calls of vLLM on both sides, and the slowest worker counts. "load": the loader's `load_weights` without packing for
the CPU; "ready": `load_weights` and vLLM's `process_weights_after_loading`, which pack on either side; "total": that
and the model's construction; "memory": the worker's own once the engine is up (RssAnon), with a KV cache of 64 MiB.
Ratios are ours / theirs: below 1, ours is faster or smaller.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from titan_bridge import cpu

SIZES = {
    "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": False,
}  # fmt: skip
"""0.52 B parameters, 1.04 GB in bfloat16."""
FIGURES = ("load", "ready", "total", "memory")
"""Seconds, and of the last one GB."""
_MAP_LOCKED = 0x2000  # of Linux; the module mmap does not name it
SECONDS: defaultdict[str, float] = defaultdict(float)
"""Of this worker, by call."""


class LoadTimes:
    """Mixed into vLLM's worker through `worker_extension_cls`; importing this module in a worker starts the clocks."""

    def load_times(self) -> dict[str, Any]:
        """Seconds and bytes of this worker, and the class that it serves."""
        model = self.get_model()  # type: ignore[attr-defined]  # the worker's
        lines = Path("/proc/self/status").read_text().splitlines()
        memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        return {"class": name, "seconds": dict(SECONDS), "memory": memory}


def start_clocks() -> None:
    """Time vLLM's calls in this process, on both sides alike."""
    # Only workers import the engine.
    from vllm.model_executor.model_loader import base_loader, default_loader  # noqa: PLC0415

    from titan_bridge.engine.cpu import packing  # noqa: PLC0415
    from titan_bridge.engine.loading import model_loader  # noqa: PLC0415

    for holder, name, figure in (
        (base_loader, "initialize_model", "build"),
        (base_loader, "process_weights_after_loading", "process"),
        (default_loader.DefaultModelLoader, "load_weights", "load_weights"),
        (model_loader.TitanModelLoader, "load_weights", "load_weights"),
        (packing.Packing, "_pack", "pack"),
    ):
        setattr(holder, name, _timed(getattr(holder, name), figure))


def _timed(call: Callable[..., Any], figure: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            SECONDS[figure] += time.perf_counter() - began

    return timed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=("qwen3", "llama3"), default="qwen3")
    parser.add_argument("--tp", type=int, action="append", help="may be repeated; 1 and 2 without it")
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument("--starts", type=int, default=5, help="engines started a side (default 5)")
    parser.add_argument("--models", type=Path, default=Path("out/bench"), help="where the model is made")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _measure(json.loads(args.worker))
    model = _model(args.models, args.family)
    rows = [_row(model, tp, args) for tp in args.tp or (1, 2)]
    Console(width=None if sys.stdout.isatty() else 140).print(_table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"cores": len(cpu.cores()), "rows": rows}, indent=1))
    return 0


def _row(model: Path, tp: int, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {"torchtitan": [], "vllm": []}
    for start in range(args.starts):
        for impl in ("torchtitan", "vllm") if start % 2 == 0 else ("vllm", "torchtitan"):
            with _cached(model, args.cache):
                found[impl].append(_start(model, impl, tp))
            print(f"tp={tp} {args.cache} {impl}: {found[impl][-1]}", file=sys.stderr)
    row: dict[str, Any] = {"family": args.family, "tp": tp, "cache": args.cache, "starts": args.starts}
    row["bytes"] = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    for figure in FIGURES:
        ours, theirs = (
            statistics.median(seconds[figure] for seconds in found[impl]) for impl in ("torchtitan", "vllm")
        )
        row[figure] = {"ours": ours, "theirs": theirs, "ratio": ours / theirs}
        row[figure] |= {f"all_{impl}": [seconds[figure] for seconds in found[impl]] for impl in found}
    return row


def _start(model: Path, impl: str, tp: int) -> dict[str, float]:
    """Start one engine in a process of its own; figures of its slowest, and of its largest worker."""
    options = {
        "model": str(model), "model_impl": impl, "tensor_parallel_size": tp, "dtype": "bfloat16", "enforce_eager": True,
        "max_model_len": 256, "max_num_seqs": 4, "worker_extension_cls": "bench_load.LoadTimes",
        "skip_tokenizer_init": True, "kv_cache_memory_bytes": 64 << 20,
    }  # fmt: skip
    folder = Path(__file__).parent
    environment = {
        **os.environ,
        **cpu.environment(tp, given=os.environ, options=options),
        "HF_HUB_OFFLINE": "1",
    }
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(folder), str(folder.parent), os.environ.get("PYTHONPATH")))
    )
    with tempfile.TemporaryDirectory() as name:
        log, answer = Path(name, "log"), Path(name, "answer.json")
        job = json.dumps({"options": options, "answer": str(answer)})
        with log.open("w") as output:
            done = subprocess.run(
                [sys.executable, __file__, "--worker", job],
                env=environment, stdout=output, stderr=output, check=False,
            )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{impl} failed:\n{log.read_text()[-4000:]}")
        workers = json.loads(answer.read_text())
    ours = impl == "torchtitan"
    assert all(worker["class"].startswith("titan_bridge.") == ours for worker in workers), workers
    return {figure: max(_figures(worker)[figure] for worker in workers) for figure in FIGURES}


def _figures(worker: Mapping[str, Any]) -> dict[str, float]:
    seconds = worker["seconds"]
    return {
        "load": seconds["load_weights"] - seconds.get("pack", 0.0),
        "ready": seconds["load_weights"] + seconds["process"],
        "total": seconds["build"] + seconds["load_weights"] + seconds["process"],
        "memory": worker["memory"] / 1e9,
    }


def _measure(job: Mapping[str, Any]) -> int:
    from vllm import LLM  # noqa: PLC0415  the engine is only imported in the process that runs it

    llm = LLM(**job["options"])
    Path(job["answer"]).write_text(json.dumps(llm.collective_rpc("load_times")))
    return 0


def _model(folder: Path, family: Any) -> Path:
    import torch  # noqa: PLC0415  needed only to make a model

    from titan_bridge.testing import make_checkpoint  # noqa: PLC0415

    path = folder / f"load-{family}"
    if not (path / "config.json").is_file():
        make_checkpoint(path, family, dtype=torch.bfloat16, std=0.02, tokenizer=False, **SIZES)
    return path


@contextlib.contextmanager
def _cached(model: Path, cache: str) -> Iterator[None]:
    """The files in the page cache meanwhile, locked there if the kernel lets us, or none of them at the beginning."""
    os.sync()
    with contextlib.ExitStack() as stack:
        for file in model.glob("*.safetensors"):
            with file.open("rb", buffering=0) as opened:
                if cache == "cold":
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    continue
                while opened.read(8 << 20):
                    pass
                with contextlib.suppress(OSError):  # more than this user may lock
                    flags = mmap.MAP_SHARED | _MAP_LOCKED
                    stack.enter_context(mmap.mmap(opened.fileno(), 0, flags, mmap.PROT_READ))
        yield


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first['bytes'] / 1e9:.2f} GB of {first['family']} in bf16, {first['cache']} cache, {len(cpu.cores())} "
        f"cores; seconds and GB, ours / theirs, medians of {first['starts']} starts",
        title_justify="left",
    )
    table.add_column("tp")
    for figure in FIGURES:
        table.add_column(figure)
        table.add_column("ratio")
    for row in rows:
        cells = [str(row["tp"])]
        for figure in FIGURES:
            found = row[figure]
            cells += [f"{found['ours']:.2f} / {found['theirs']:.2f}", f"{found['ratio']:.2f}"]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
elif __name__ == "bench_load":  # as `worker_extension_cls` in a worker
    start_clocks()
