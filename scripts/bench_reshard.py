"""How long resharding takes and how much memory, against a raw copy, TorchTitan's conversion and dcp_to_torch_save.

    python scripts/bench_reshard.py                     about 1.5 GB of Qwen3 in float32, made on the spot
    python scripts/bench_reshard.py --layers 40         a larger one
    python scripts/bench_reshard.py --json              for machines
    python scripts/bench_reshard.py --only ours         without the slow ones

Every row is a process of its own, so that peak memory is its own and the imports count. "cold": the source was dropped
from the page cache; "warm": it was read before. "raw copy" is `cp` of the source's weight files: all of them, also
where half as many bytes are written, by one thread in the kernel, which looks at none. It and the command import the
same first, each in its own process, and are compared by what follows, from the flags on until it is done; that a
process with torch takes 0.2 to 0.4 s to end is in neither. A virtual machine gives free memory back to its host within
seconds, and what starts right after files were removed finds theirs and is up to eight times as fast: hence a pause
before every run. TorchTitan's conversions are the calls of its scripts/checkpoint_conversion, which the package does
not ship: build the model, fill its state dict, run the adapter, save. What is written is compared tensor by tensor, bit
for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SETTLE_SECONDS = 5
WIDTH = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
}
IMPORTS = """
import time, tyro, titan_bridge.commands.reshard
from titan_bridge.cli import imports
with imports():
    import titan_bridge.checkpoint.reshard, titan_bridge.checkpoint.team
    from titan_bridge.models import families
families()
print(time.monotonic(), flush=True)
"""
"""The clock is the machine's: who waits for the process can tell how long its imports took."""
OURS = (
    IMPORTS
    + """
import sys
from titan_bridge.cli import script
code = script(["reshard", *sys.argv[1:]])
print(time.monotonic())
sys.exit(code)
"""
)
COPY = (
    IMPORTS
    + """
import os, subprocess, sys
from titan_bridge.cli import leave
os.makedirs(sys.argv[1])
subprocess.run(["cp", *sys.argv[2:], sys.argv[1]], check=True)
print(time.monotonic())
leave()
"""
)
TITAN = """
import sys, torch, torch.distributed.checkpoint as dcp
from pathlib import Path
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torchtitan.components.checkpointer.base import ModelWrapper
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter
from titan_bridge.models import family_for, load_hf_config
direction, source, target, assets, dtype = sys.argv[1:]
config = family_for(load_hf_config(assets)).model_config(load_hf_config(assets))
with torch.inference_mode():
    with torch.device("cpu"):
        model = ModelWrapper(config.build())
    adapter = Qwen3StateDictAdapter(config, assets)
    state = model._get_state_dict()
    if direction == "from_hf":
        hf = adapter.to_hf(state)
        dcp.load(hf, storage_reader=HuggingFaceStorageReader(path=source))
        dcp.save(adapter.from_hf(hf), checkpoint_id=target)
    else:
        dcp.load(state, checkpoint_id=source)
        hf = adapter.to_hf(state)
        writer = HuggingFaceStorageWriter(
            path=target, save_distributed=True, fqn_to_index_mapping=adapter.fqn_to_index_mapping,
            enable_consolidation=True, thread_count_consolidation=5,
        )
        if dtype != "float32":
            hf = {name: tensor.to(getattr(torch, dtype)) for name, tensor in hf.items()}
        dcp.save(hf, storage_writer=writer)
"""
MAKE = """
import json, sys
from titan_bridge.testing import make_checkpoint
make_checkpoint(sys.argv[1], "qwen3", **json.loads(sys.argv[2]))
"""
COMPARE = """
import sys, torch
from titan_bridge.checkpoint import open_checkpoint
with open_checkpoint(sys.argv[1]) as a, open_checkpoint(sys.argv[2]) as b:
    names = [name for name in a.tensors if not name.endswith("expert_bias_E")]
    assert set(names) == set(b.tensors), "other names"
    for name in names:
        assert torch.equal(a.read(name), b.read(name)), name
"""
TORCH_SAVE = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured command: medians over the repeats."""

    task: str
    who: str
    cache: str
    seconds: float
    """Wall time of the process, from start to end."""
    imports: float
    """Seconds of it that the imports took; TorchTitan's and torch's are not taken apart: 0."""
    work: float
    """Seconds after the imports, until it is done."""
    all_work: tuple[float, ...]
    cpu: float
    """Seconds of all cores."""
    peak: int
    """Bytes: the largest resident set, imports included."""
    read: int
    """Bytes of weights in the source."""
    written: int


def weights(directory: Path) -> list[Path]:
    """The files that hold weights."""
    return sorted(
        p for p in directory.rglob("*") if p.suffix in (".safetensors", ".distcp", ".pt") and p.is_file()
    )


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in (weights(path) if path.is_dir() else [path]))


def set_cache(directory: Path, cache: str) -> None:
    """Have the weights in the page cache, or out of it, and nothing waiting to be written."""
    os.sync()
    for file in weights(directory):
        with file.open("rb", buffering=0) as opened:
            if cache == "cold":
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(8 << 20):
                    pass
    time.sleep(SETTLE_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one process took."""

    seconds: float
    """Wall time."""
    imports: float
    """Seconds of it until the process printed that its imports are done; 0 if it does not."""
    work: float
    """Seconds from then until it printed that it is done; all if it does not."""
    cpu: float
    """Seconds of all cores, in the program and in the kernel; says more where others use the machine."""
    peak: int
    """Bytes."""


def run(command: Sequence[str]) -> Usage:
    """Run a process. Exits when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        printed = log.read().decode()
        if child.returncode:
            sys.exit(f"{' '.join(command)[:300]} failed:\n{printed[-3000:]}")
    began, done = start, start + seconds
    if any(IMPORTS in argument for argument in command):
        stamps = printed.split()
        began, done = float(stamps[0]), float(stamps[-1])
    return Usage(
        seconds=seconds,
        imports=began - start,
        work=done - began,
        cpu=usage.ru_utime + usage.ru_stime,
        peak=usage.ru_maxrss * 1024,
    )


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def bench(base: Path, layers: int, repeats: int, only: str) -> tuple[list[Row], dict[str, Any]]:
    """All rows, and what was found beside them."""
    hf, dcp = base / "hf", base / "dcp"
    # In a process: Linux counts the memory of the parent before a process starts as that of the process.
    run(python(MAKE, hf, json.dumps(WIDTH | {"num_hidden_layers": layers})))
    run(python(OURS, hf, dcp, "--to", "dcp"))
    started = run(python(IMPORTS))
    # (task, source, {who: command that writes the given target})
    tasks = {
        "hf to dcp": (hf, {
            "raw copy": lambda out: python(COPY, out, *weights(hf)),
            "titan-bridge": lambda out: python(OURS, hf, out, "--to", "dcp"),
            "torchtitan convert_from_hf": lambda out: python(TITAN, "from_hf", hf, out, hf, "float32"),
        }),
        "dcp to hf": (dcp, {
            "raw copy": lambda out: python(COPY, out, *weights(dcp)),
            "titan-bridge": lambda out: python(OURS, dcp, out, "--to", "hf"),
            "torchtitan convert_to_hf": lambda out: python(TITAN, "to_hf", dcp, out, hf, "float32"),
            "dcp_to_torch_save": lambda out: python(TORCH_SAVE, dcp, out),
        }),
        "dcp to hf, bfloat16": (dcp, {
            "raw copy": lambda out: python(COPY, out, *weights(dcp)),
            "titan-bridge": lambda out: python(OURS, dcp, out, "--to", "hf", "--dtype", "bfloat16"),
            "torchtitan convert_to_hf": lambda out: python(TITAN, "to_hf", dcp, out, hf, "bfloat16"),
        }),
    }  # fmt: skip
    rows, same = [], []
    for task, (source, commands) in tasks.items():
        kept: dict[str, Path] = {}
        for cache in ("cold", "warm"):
            found: dict[str, list[Usage]] = {}
            written: dict[str, int] = {}
            # Alternating, so that what else the machine does hits all of them.
            for repeat in range(repeats):
                for who, command in commands.items():
                    slow = who not in ("raw copy", "titan-bridge")
                    if slow and (only == "ours" or cache == "cold" or repeat):
                        continue
                    out = base / "out" / who.replace(" ", "-")
                    set_cache(source, cache)
                    found.setdefault(who, []).append(run(command(out)))
                    written[who] = size(out)
                    if who != "raw copy" and cache == "warm" and out.is_dir():
                        kept.setdefault(who, out.rename(base / "kept" / out.name) if who not in kept else out)
                    remove(out)
            for who, results in found.items():
                work = tuple(result.work for result in results)
                rows.append(
                    Row(
                        task=task,
                        who=who,
                        cache=cache,
                        seconds=statistics.median(result.seconds for result in results),
                        imports=statistics.median(result.imports for result in results),
                        work=statistics.median(work),
                        all_work=work,
                        cpu=statistics.median(result.cpu for result in results),
                        peak=max(result.peak for result in results),
                        read=size(source),
                        written=written[who],
                    )
                )
                print(f"{task}, {who}, {cache}: {', '.join(f'{s:.1f}' for s in work)} s", file=sys.stderr)
        theirs = [path for who, path in kept.items() if who.startswith("torchtitan")]
        if theirs:
            run(python(COMPARE, kept["titan-bridge"], theirs[0]))
            same.append(task)
        for path in kept.values():
            remove(path)
    facts = {
        "import_seconds": started.imports,
        "import_peak": started.peak,
        "layers": layers,
        "same_tensors_as_torchtitan": same,
    }
    return rows, facts


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def show(rows: list[Row], facts: dict[str, Any]) -> None:
    table = Table(
        title=f"{rows[0].read / 1e9:.2f} GB of source, {os.cpu_count()} cores; imports alone: "
        f"{facts['import_seconds']:.1f} s, {facts['import_peak'] / 1e6:.0f} MB",
        title_justify="left",
    )
    left = ("task", "who", "cache")
    for column in (
        *left,
        "seconds",
        "cpu",
        "after imports",
        "runs",
        "against raw copy",
        "peak memory",
        "against titan-bridge",
    ):
        table.add_column(column, justify="left" if column in left else "right")
    for row in rows:
        by_who = {other.who: other for other in rows if (other.task, other.cache) == (row.task, row.cache)}
        raw, ours = by_who["raw copy"], by_who["titan-bridge"]
        theirs = row.who not in ("raw copy", "titan-bridge")
        table.add_row(
            row.task,
            row.who,
            row.cache,
            f"{row.seconds:.1f}",
            f"{row.cpu:.1f}",
            f"{row.work:.1f}",
            " ".join(f"{s:.1f}" for s in row.all_work),
            "" if theirs else f"{row.work / raw.work:.2f}",
            f"{row.peak / 1e6:.0f} MB",
            f"{row.seconds / ours.seconds:.1f} x time, {row.peak / ours.peak:.1f} x memory" if theirs else "",
        )
    console = Console(width=None if sys.stdout.isatty() else 190)
    console.print(table)
    tasks = facts["same_tensors_as_torchtitan"]
    if tasks:
        console.print(f"the same tensors as TorchTitan's, bit for bit: {', '.join(tasks)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=20, help="of a Qwen3 of width 1024; about 63 MB each")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of raw copy and titan-bridge; the others run once"
    )
    parser.add_argument("--only", choices=("all", "ours"), default="all")
    parser.add_argument("--dir", type=Path, help="where to work; it needs about five times the model's bytes")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="bench_reshard-") as directory:
        base = Path(directory)
        (base / "out").mkdir()
        (base / "kept").mkdir()
        rows, facts = bench(base, arguments.layers, arguments.repeats, arguments.only)
    if arguments.json:
        print(json.dumps({**facts, "rows": [asdict(row) for row in rows]}))
    else:
        show(rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
