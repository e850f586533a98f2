"""How long a delta takes: to find it, check it and apply it, against vLLM's own patches and the least it can take.

    python scripts/bench_sparse.py            the table
    python scripts/bench_sparse.py --json     for machines

Two tensors of 8192 x 4096, float32 on one trainer rank, bf16 on a worker that holds half of the rows (tp=2), and of
the changed elements. "find" is what the trainer does for both workers: compare with its snapshot, and gather
positions and values. "check" is what a worker does with what arrives, "apply" what happens in the commit. "vLLM" is
`load_checkpoint_weight_patches`, which every worker runs on all entries, through a loader that cuts the rows of its
rank and copies them. "compare" is one comparison of two bf16 tensors as large as the trainer's, and "floor"
`index_copy_` with what is already right for it. All are the best of several runs, alternating, on one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.plan import plan
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.transfer.layouts import shifted
from titan_bridge.transfer.messages import messages
from titan_bridge.transfer.snapshot import Snapshot
from titan_bridge.transfer.staging import Staged, Staging, located
from titan_bridge.transfer.target import Target

ROWS, COLUMNS, TENSORS, TP = 8192, 4096, 2, 2
FRACTIONS = (0.001, 0.01, 0.1)
NAMES = [f"w{i}" for i in range(TENSORS)]


class Served(nn.Module):
    """Rank 0's half of the rows, with a loader as vLLM's layers have it: narrow, then copy."""

    def __init__(self, live: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.live = live

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        names = set()
        for name, tensor in weights:
            self.live[name].copy_(tensor.narrow(0, 0, ROWS // TP))
            names.add(name)
        return names


def best(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of `repeats` runs of each, one after the other in turn."""
    seconds = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def layout(ranks: int, placement: Replicate | Shard, dtype: str) -> Layout:
    spec = ShardingSpec(mesh="m", placements=(placement,))
    param = ParamLayout(spec=spec, shape=(ROWS, COLUMNS), dtype=dtype)
    return Layout(meshes={"m": MeshLayout.make(("a",), (ranks,))}, params=dict.fromkeys(NAMES, param))


def measure(fraction: float, repeats: int) -> dict[str, float]:
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (  # noqa: PLC0415  after the log level
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    served = layout(TP, Shard(0), "bfloat16")
    made = plan(layout(1, Replicate(), "float32"), shifted(served, 1))
    dtypes = dict.fromkeys(NAMES, "bfloat16")
    out, into = messages(made, dtypes, sender=0), messages(made, dtypes, receiver=1)
    master = {name: torch.ones(ROWS, COLUMNS) for name in NAMES}
    ours = {name: torch.ones(ROWS // TP, COLUMNS, dtype=torch.bfloat16) for name in NAMES}
    theirs = {name: tensor.clone() for name, tensor in ours.items()}
    snapshot = Snapshot()
    snapshot.take(master, out.values())
    count = int(ROWS * COLUMNS * fraction)
    patches = []
    for name in NAMES:
        at = torch.randperm(ROWS * COLUMNS)[:count].sort().values
        master[name].view(-1)[at] = torch.randn(count)
        values = master[name].view(-1)[at].bfloat16()
        patches.append(
            CheckpointWeightPatch(
                name=name, shape=(ROWS, COLUMNS), dtype=torch.bfloat16, values=values, indices=at.int()
            )
        )
    delta = snapshot.deltas(master, out)[1]
    target = Target(tensors=lambda: ours, layout=served, rank=0, index=0)
    staging, counts = Staging(into, target, ours), iter(delta.counts.tolist())
    came = [
        (bucket, [next(counts) for _ in bucket.slices], *part)
        for bucket, part in zip(into[0], delta.parts, strict=True)
    ]
    arrived = Staged(delta=[entry for each in came for entry in located("a worker", *each)])
    ready = [(ours[name].view(-1), at, values) for name, at, values in arrived.delta]
    old, new = (torch.ones(ROWS * TENSORS, COLUMNS, dtype=torch.bfloat16).view(torch.int16) for _ in "ab")
    seconds = best(
        {
            "find": lambda: snapshot.deltas(master, out),
            "compare": lambda: old != new,
            "check": lambda: [located("a worker", *each) for each in came],
            "apply": lambda: staging.write([arrived]),
            "floor": lambda: [flat.index_copy_(0, at, values) for flat, at, values in ready],
        },
        repeats,
    )
    model = Served(theirs)
    seconds |= best({"vllm": lambda: load_checkpoint_weight_patches(model, patches)}, max(2, repeats // 4))
    assert all(torch.equal(ours[name], theirs[name]) for name in NAMES), "the two disagree"
    local = int(delta.counts.sum())
    return {
        "fraction": fraction,
        "entries": local,
        **seconds,
        "find_over_compare": seconds["find"] / seconds["compare"],
        "apply_over_floor": seconds["apply"] / seconds["floor"],
        "vllm_over_check_and_apply": seconds["vllm"] / (seconds["check"] + seconds["apply"]),
        "wire_bytes_over_needed": delta.nbytes / (6 * local),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [measure(fraction, given.repeats) for fraction in FRACTIONS]
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    times = ("find", "compare", "check", "apply", "floor", "vllm")
    ratios = ("find_over_compare", "apply_over_floor", "vllm_over_check_and_apply")
    table = Table("changed", "entries", *(f"{name} ms" for name in times), *ratios, "wire / needed")
    for row in rows:
        table.add_row(
            f"{row['fraction']:.1%}",
            f"{row['entries']:,}",
            *(f"{row[name] * 1e3:.2f}" for name in times),
            *(f"{row[name]:.2f}" for name in ratios),
            f"{row['wire_bytes_over_needed']:.5f}",
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
