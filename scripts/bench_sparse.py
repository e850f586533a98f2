"""How long a worker takes to apply a sparse update, against vLLM's own patches and against the least it can take.

    python scripts/bench_sparse.py            the table
    python scripts/bench_sparse.py --json     for machines

Two bf16 tensors of 8192 x 4096 at tp=2: the worker holds half of the rows, and of the changed elements. "apply" is
what `finish_weight_update` does with entries that have arrived; "check" comes before it and makes sure that no entry
is there twice. "vLLM" is `load_checkpoint_weight_patches`, which every worker runs on all entries, through a loader
that cuts the rows of its rank and copies them. "floor" is `index_copy_` with what is already right for it. All are
the best of several runs, alternating, on one thread.
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
from torch.distributed.tensor import Shard

from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.transfer.packets import apply_sparse, stage
from titan_bridge.transfer.sparse import Patch, Router

ROWS, COLUMNS, TENSORS, TP = 8192, 4096, 2, 2
FRACTIONS = (0.001, 0.01, 0.1)


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


def measure(fraction: float, repeats: int) -> dict[str, float]:
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (  # noqa: PLC0415  after the log level
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    names = [f"w{i}" for i in range(TENSORS)]
    spec = ShardingSpec(mesh="m", placements=(Shard(0),))
    params = {name: ParamLayout(spec=spec, shape=(ROWS, COLUMNS), dtype="bfloat16") for name in names}
    layout = Layout(meshes={"m": MeshLayout.make(("tp",), (TP,))}, params=params)
    count = int(ROWS * COLUMNS * fraction)
    patches = [
        Patch(
            name=name,
            indices=torch.randperm(ROWS * COLUMNS)[:count].sort().values,
            values=torch.randn(count).bfloat16(),
        )
        for name in names
    ]
    ours = {name: torch.ones(ROWS // TP, COLUMNS, dtype=torch.bfloat16) for name in names}
    theirs = {name: tensor.clone() for name, tensor in ours.items()}
    router = Router(layout)
    outbox = router.route(patches)
    entries = outbox.to[0]
    staged = [stage(name, entries[name], ours[name].numel()) for name in names]
    served = Served(theirs)
    checkpoint = [
        CheckpointWeightPatch(
            name=patch.name,
            shape=(ROWS, COLUMNS),
            dtype=torch.bfloat16,
            values=patch.values,
            indices=patch.indices.int(),
        )
        for patch in patches
    ]
    ready = [(ours[each.name].view(-1), each.positions, each.values) for each in staged]
    seconds = best(
        {
            "route": lambda: router.route(patches),
            "check": lambda: [stage(name, entries[name], ours[name].numel()) for name in names],
            "apply": lambda: apply_sparse(staged, ours),
            "floor": lambda: [flat.index_copy_(0, at, values) for flat, at, values in ready],
        },
        repeats,
    )
    seconds |= best(
        {"vllm": lambda: load_checkpoint_weight_patches(served, checkpoint)}, max(2, repeats // 4)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in names), "the two disagree"
    sent = sum(e.positions.nbytes + e.values.nbytes for e in (part for t in entries.values() for part in t))
    local = sum(len(each.positions) for each in staged)
    return {
        "fraction": fraction,
        "entries": local,
        **{name: seconds[name] for name in ("route", "check", "apply", "floor", "vllm")},
        "apply_over_floor": seconds["apply"] / seconds["floor"],
        "vllm_over_apply": seconds["vllm"] / seconds["apply"],
        "vllm_over_check_and_apply": seconds["vllm"] / (seconds["check"] + seconds["apply"]),
        "wire_bytes_over_needed": (sent + 8 + 16 * TENSORS) / (6 * local),
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
    table = Table("changed", "entries", "route ms", "check ms", "apply ms", "floor ms", "vLLM ms")
    for title in ("apply / floor", "vLLM / apply", "vLLM / (check + apply)", "wire / needed"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            f"{row['fraction']:.1%}",
            f"{row['entries']:,}",
            *(f"{row[name] * 1e3:.2f}" for name in ("route", "check", "apply", "floor", "vllm")),
            f"{row['apply_over_floor']:.2f}",
            f"{row['vllm_over_apply']:.1f}",
            f"{row['vllm_over_check_and_apply']:.1f}",
            f"{row['wire_bytes_over_needed']:.5f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
