"""How long a delta takes: to find it, check it and apply it, against vLLM's own patches and the least it can take.

    python scripts/bench_sparse.py            the table
    python scripts/bench_sparse.py --json     for machines

Two tensors of 8192 x 4096, float32 on one trainer rank, bf16 on a worker that holds half of the rows (tp=2), and of
the changed elements. "find" is what the trainer does for both workers: compare with its snapshot, and gather
positions and values. "check" is what a worker does with what arrives, "apply" what happens in the commit. "vllm" is
`load_checkpoint_weight_patches`, which every worker runs on all entries, through a loader that cuts the rows of its
rank and copies them. "compare" is one comparison of two bf16 tensors as large as the trainer's, and "floor"
`index_copy_` with what is already right for it. "all" is `Trainer.send()` of a delta between processes, one trainer
rank and both workers, and "sparse_nccl" what vLLM's engine of that name does, over gloo: the trainer compares with a
copy, positions and values are broadcast to all, and every worker puts all of them through its loader. All are the
best of several runs, alternating but for the last two, on one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from bench_transfer import group, root
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from titan_bridge.ports import free_port
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.plan import plan
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.testing_processes import PlainClient, plain_ranks, plain_workers
from titan_bridge.testing_samples import sample_target
from titan_bridge.transfer import Trainer
from titan_bridge.transfer.layouts import shifted
from titan_bridge.transfer.messages import messages
from titan_bridge.transfer.snapshot import Snapshot
from titan_bridge.transfer.staging import Staging, located
from titan_bridge.transfer.target import Target
from titan_bridge.transfer.worker import Worker

ROWS, COLUMNS, TENSORS, TP = 8192, 4096, 2, 2
FRACTIONS = (0.001, 0.01, 0.1)
NAMES = [f"w{i}" for i in range(TENSORS)]
Tensors = Mapping[str, torch.Tensor]


class Served(nn.Module):
    """One rank's half of the rows, with a loader as vLLM's layers have it: narrow, then copy."""

    def __init__(self, live: dict[str, torch.Tensor], rank: int = 0) -> None:
        super().__init__()
        self.live, self.first = live, rank * (ROWS // TP)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        names = set()
        for name, tensor in weights:
            self.live[name].copy_(tensor.narrow(0, self.first, ROWS // TP))
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
    arrived = [entry for each in came for entry in located("a worker", *each)]
    ready = [(ours[name].view(-1), at, values) for name, at, values in arrived]
    old, new = (torch.ones(ROWS * TENSORS, COLUMNS, dtype=torch.bfloat16).view(torch.int16) for _ in "ab")
    seconds = best(
        {
            "find": lambda: snapshot.deltas(master, out),  # which leaves no element of `ours` in a cache
            "apply": lambda: staging.write(arrived),
            "compare": lambda: old != new,  # nor does this
            "floor": lambda: [flat.index_copy_(0, at, values) for flat, at, values in ready],
            "check": lambda: [located("a worker", *each) for each in came],
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


def patches_of(master: Tensors, kept: Tensors) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """int32 positions and values of what an engine in bf16 would see change; `kept` is brought up to date."""
    found = []
    for name, tensor in master.items():
        now = tensor.bfloat16().view(-1)
        at = (now.view(torch.int16) != kept[name].view(-1).view(torch.int16)).nonzero().view(-1)
        kept[name].view(-1)[at] = values = now[at]
        found.append((at.int(), values))
    return found


def patched_worker(worker: Worker, port: int, counts: list[int], repeats: int) -> None:
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (  # noqa: PLC0415  in workers only
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    logging.disable(logging.WARNING)
    pg, index = group(port, 1 + worker.target.index, 1 + TP), worker.target.index
    model = Served(dict(worker.target.tensors()), index)
    for _ in range(repeats):
        pg.barrier().wait()
        patches = []
        for name, count in zip(NAMES, counts, strict=True):
            at, values = torch.empty(count, dtype=torch.int32), torch.empty(count, dtype=torch.bfloat16)
            for part in (at, values):
                pg.broadcast([part.view(torch.uint8)], root(pg)).wait()
            patches.append(
                CheckpointWeightPatch(
                    name=name, shape=(ROWS, COLUMNS), dtype=values.dtype, values=values, indices=at
                )
            )
        load_checkpoint_weight_patches(model, patches)
        pg.barrier().wait()


def change(master: Tensors, fraction: float) -> None:
    for tensor in master.values():
        at = torch.arange(0, tensor.numel(), round(1 / fraction))
        tensor.view(-1)[at] += 1 + torch.rand(len(at))


def trainer_rank(
    rank: int, world: int, client: PlainClient, port: int, fraction: float, repeats: int
) -> dict[str, float]:
    master = {name: torch.ones(ROWS, COLUMNS) for name in NAMES}
    ours, theirs = [], []
    with Trainer(lambda: master, client) as trainer:
        trainer.send()
        for _ in range(repeats):
            change(master, fraction)
            report = trainer.send()
            assert report.kind == "delta"
            ours.append(report.seconds)
        trainer.verify()
    kept = {name: tensor.bfloat16() for name, tensor in master.items()}
    counts = [len(range(0, ROWS * COLUMNS, round(1 / fraction)))] * TENSORS
    thread = threading.Thread(target=lambda: client.call(patched_worker, port, counts, repeats), daemon=True)
    thread.start()
    pg = group(port, 0, 1 + TP)
    for _ in range(repeats):
        change(master, fraction)
        pg.barrier().wait()
        started = time.perf_counter()
        for patch in patches_of(master, kept):
            for part in patch:
                pg.broadcast([part.view(torch.uint8)], root(pg)).wait()
        pg.barrier().wait()
        theirs.append(time.perf_counter() - started)
    thread.join()
    with Trainer(lambda: master, client) as trainer:
        trainer.connect()
        trainer.verify()  # theirs arrived, too
    return {"all": min(ours), "sparse_nccl": min(theirs)}


def end_to_end(fraction: float, repeats: int) -> dict[str, float]:
    """Find, send and apply, between processes: `send()`, and what vLLM's `sparse_nccl` does, over gloo."""
    served = layout(TP, Shard(0), "bfloat16").to_json()
    with (
        plain_workers(sample_target, [(served, rank, rank, 1) for rank in range(TP)]) as (client, _),
        plain_ranks(1) as ranks,
    ):
        return ranks.run(trainer_rank, client, free_port(), fraction, repeats)[0]


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
    few = max(2, given.repeats // 3)
    rows = [measure(fraction, given.repeats) | end_to_end(fraction, few) for fraction in FRACTIONS]
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    times = ("find", "compare", "check", "apply", "floor", "vllm", "all", "sparse_nccl")
    ratios = ("find_over_compare", "apply_over_floor", "vllm_over_check_and_apply")
    table = Table(
        "changed",
        "entries",
        *(f"{name} ms" for name in times),
        *ratios,
        "wire / needed",
    )
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
