"""How long live weight transfer takes: trainer and workers on this machine, by tp, over shared memory and over TCP.

    python scripts/bench_transfer.py                  tp 1, 2 and 4, the shapes of Qwen3-0.6B (1.2 GB in bf16)
    python scripts/bench_transfer.py --like 8B        layers as wide as Qwen3-8B's, three of them (1.4 GB)
    python scripts/bench_transfer.py --tp 2 --json    for machines
    python scripts/bench_transfer.py --layers 2       a small model, to try it

Two FSDP trainer ranks with bf16 shards; the workers are processes with live tensors, not engines, so that nothing
but the transfer is measured. In the same run, in turn, the best of several:

  ours      `send()` of all weights: from the call to the weights being live. "arrived": when every worker has all
            bytes in its staging; what follows is the copy into the live tensors, which all-or-nothing costs
  floor     the same bytes between the same pairs of processes, bare gloo send and recv into memory that is there
  gather    what others do: gather each tensor to rank 0, broadcast it to all workers, each copies its slice
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, get_args

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor

from titan_bridge.mesh import Sizes
from titan_bridge.model_layout import layout
from titan_bridge.ports import free_port
from titan_bridge.sharding.layout import Layout
from titan_bridge.testing_processes import PlainClient, plain_ranks, plain_workers
from titan_bridge.testing_samples import local_part, same_bits, sample_dtensors, sample_target
from titan_bridge.transfer import Options, Trainer
from titan_bridge.transfer.options import Transport
from titan_bridge.transfer.worker import Worker

TRAINERS = 2
LIMIT = timedelta(seconds=300)
MESSAGE = 64 * 2**20


SIZES = {
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "vocab_size": 151_936,
    },
    # With a smaller vocabulary and few layers, so that all three ways fit into memory side by side.
    "8B": {"hidden_size": 4096, "intermediate_size": 12_288, "num_attention_heads": 32, "vocab_size": 32_000},
}
LAYERS = {"0.6B": 28, "8B": 3}


def config(like: str, layers: int) -> dict[str, Any]:
    """Sizes of a Qwen3."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        **SIZES[like],
    }


def group(port: int, rank: int, size: int) -> dist.ProcessGroupGloo:
    store = dist.TCPStore("127.0.0.1", port, None, rank == 0, LIMIT, wait_for_workers=False)
    return dist.ProcessGroupGloo(store, rank, size, LIMIT)


def exchange(pg: dist.ProcessGroupGloo, sizes: dict[int, int], *, send: bool, memory: torch.Tensor) -> None:
    """Move `sizes[peer]` bytes to or from each peer, in messages as large as ours, all at once."""
    works, at = [], 0
    for peer, total in sizes.items():
        for tag, first in enumerate(range(0, total, MESSAGE)):
            part = memory[at + first : at + min(first + MESSAGE, total)]
            works.append(pg.send([part], peer, tag) if send else pg.recv([part], peer, tag))
        at += total
    for work in works:
        work.wait(LIMIT)


def floor_worker(worker: Worker, port: int, traffic: list[list[int]], repeats: int) -> None:
    index = worker.target.index
    size = TRAINERS + len(traffic[0])
    pg = group(port, TRAINERS + index, size)
    sizes = {source: traffic[source][index] for source in range(TRAINERS)}
    memory = torch.ones(sum(sizes.values()), dtype=torch.uint8)
    for _ in range(repeats):
        pg.barrier().wait()
        exchange(pg, sizes, send=False, memory=memory)
        pg.barrier().wait()


def floor_trainer(rank: int, port: int, traffic: list[list[int]], repeats: int) -> list[float]:
    pg = group(port, rank, TRAINERS + len(traffic[0]))
    sizes = {TRAINERS + at: n for at, n in enumerate(traffic[rank])}
    memory = torch.ones(sum(sizes.values()), dtype=torch.uint8)
    seconds = []
    for _ in range(repeats):
        pg.barrier().wait()
        started = time.perf_counter()
        exchange(pg, sizes, send=True, memory=memory)
        pg.barrier().wait()
        seconds.append(time.perf_counter() - started)
    return seconds


def gather_worker(worker: Worker, port: int, workers: int, repeats: int) -> int:
    target = worker.target
    live = target.tensors()
    pg = group(port, 1 + target.index, 1 + workers)
    received = 0
    for _ in range(repeats):
        pg.barrier().wait()
        received = 0
        for name in sorted(live):
            param = target.layout.params[name]
            whole = torch.empty(param.shape, dtype=live[name].dtype)
            pg.broadcast([whole], root(pg)).wait(LIMIT)
            received += whole.nbytes
            for piece in target.layout.pieces(name, target.rank):
                live[name][piece.local.slices].copy_(whole[piece.box.slices])
        pg.barrier().wait()
    return received


def gather_trainer(
    rank: int, port: int, held: dict[str, torch.Tensor], workers: int, repeats: int
) -> list[float]:
    pg = group(port, 0, 1 + workers) if rank == 0 else None
    seconds = []
    for _ in range(repeats):
        if pg is not None:
            pg.barrier().wait()
        started = time.perf_counter()
        for name in sorted(held):
            tensor = held[name]
            assert isinstance(tensor, DTensor)
            whole = tensor.full_tensor()
            if pg is not None:
                pg.broadcast([whole], root(pg)).wait(LIMIT)
        if pg is not None:
            pg.barrier().wait()
        seconds.append(time.perf_counter() - started)
        dist.barrier()
    return seconds


def root(pg: dist.ProcessGroupGloo) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return options


def scramble(worker: Worker) -> None:
    """So that old bytes are not taken for new ones."""
    for tensor in worker.target.tensors().values():
        tensor.zero_()


def same(worker: Worker, told: dict[str, Any]) -> list[str]:
    """Names of tensors that are not what the trainer has."""
    from titan_bridge.testing_samples import sample  # noqa: PLC0415  run in a worker

    target = worker.target
    wrong = []
    for name, live in target.tensors().items():
        param = target.layout.params[name]
        whole = sample(name, param.shape, 1, getattr(torch, param.dtype))
        if not same_bits(live, local_part(whole, target.layout, name, target.rank)):
            wrong.append(name)
    return wrong


def trainer_rank(
    rank: int,
    world: int,
    ports: list[int],
    told: dict[str, Any],
    client: PlainClient,
    repeats: int,
    transport: Transport,
) -> dict[str, Any]:
    held = sample_dtensors(Layout.from_json(told), rank, 1)
    trainer = Trainer(lambda: held, client, options=Options(delta=False, transport=transport))
    started = time.perf_counter()
    trainer.connect()
    connecting = time.perf_counter() - started
    workers = len(client.addresses)
    if rank == 0:
        client.call(scramble)
    first = trainer.send()
    wrong = client.call(same, told) if rank == 0 else []
    assert not any(wrong), f"wrong on the workers: {wrong}"
    names = [f"engine0/{at}" for at in range(workers)]
    traffic = [[row.get(name, 0) for name in names] for row in first.sent]

    ours, floor, gather = [], [], []
    received = [0] * workers
    for turn in range(repeats):
        ours += [trainer.send() for _ in range(2)]
        floor += alongside(
            rank, client, (floor_worker, ports[2 * turn], traffic, 2),
            lambda port: floor_trainer(rank, port, traffic, 2),
        )[0]  # fmt: skip
        seconds, answers = alongside(
            rank, client, (gather_worker, ports[1 + 2 * turn], workers, 1),
            lambda port: gather_trainer(rank, port, held, workers, 1),
        )  # fmt: skip
        gather += seconds
        received = answers or received
    best = min(ours, key=lambda report: report.seconds)
    return {
        "connect": connecting,
        "seconds": best.seconds,
        "phases": dict(best.phases),
        "floor": min(floor),
        "gather": min(gather),
        "sent": traffic[rank],
        "received": [best.received[name] for name in names],
        "gather_received": received,
        "lower_bound": best.lower_bound,
        "buffers": trainer._sender.buffer_bytes,
    }


def alongside(
    rank: int, client: PlainClient, work: tuple, own: Callable[[int], list[float]]
) -> tuple[list[float], list[Any]]:
    """Run a function on all workers (called by rank 0) and one on the trainer ranks, together."""
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.extend(client.call(*work)), daemon=True)
    if rank == 0:
        thread.start()
    seconds = own(work[1])
    if rank == 0:
        thread.join()
    dist.barrier()
    return seconds, answers


def measure(tp: int, like: str, layers: int, repeats: int, transport: Transport) -> dict[str, Any]:
    hf = config(like, layers)
    source = layout(hf, Sizes(dp=TRAINERS), "shard", dtype=torch.bfloat16)
    served = layout(hf, Sizes(tp=tp), "replicate", dtype=torch.bfloat16).to_json()
    ports = [free_port() for _ in range(2 * repeats)]
    rows = [(served, rank, rank, 1) for rank in range(tp)]
    with plain_workers(sample_target, rows) as (client, _), plain_ranks(TRAINERS) as ranks:
        answers = ranks.run(trainer_rank, ports, source.to_json(), client, repeats, transport)
    first = answers[0]
    assert sum(first["received"]) == first["lower_bound"] == sum(sum(a["sent"]) for a in answers)
    return {
        "tp": tp,
        "transport": transport,
        "like": like,
        "layers": layers,
        "bytes": first["lower_bound"],
        "seconds": first["seconds"],
        "phases": first["phases"],
        "floor_seconds": first["floor"],
        "arrived_seconds": first["phases"]["received"],
        "arrived_over_floor": first["phases"]["received"] / first["floor"],
        "over_floor": first["seconds"] / first["floor"],
        "gather_seconds": first["gather"],
        "gather_over_ours": first["gather"] / first["seconds"],
        "connect_seconds": first["connect"],
        "out_of_each_trainer_rank": [sum(a["sent"]) for a in answers],
        "into_each_worker": first["received"],
        "gather_into_each_worker": first["gather_received"],
        "sender_buffers": max(a["buffers"] for a in answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--like", choices=tuple(SIZES), default="0.6B", help="whose widths the layers have")
    parser.add_argument("--layers", type=int, help="28 layers of 0.6B, 3 of 8B")
    parser.add_argument("--transports", nargs="+", choices=get_args(Transport), default=["memory", "tcp"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    layers = given.layers or LAYERS[given.like]
    rows = [
        measure(tp, given.like, layers, given.repeats, transport)
        for tp in given.tp
        for transport in given.transports
    ]
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("tp", "over", "MB", "ours s", "arrived s", "floor s", "arrived / floor", "ours / floor")
    for title in ("gather s", "gather / ours"):
        table.add_column(title, justify="right")
    for title in ("out of each trainer, MB", "into each worker, MB", "gather: into each, MB", "connect s"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            str(row["tp"]),
            row["transport"],
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['seconds']:.3f}",
            f"{row['arrived_seconds']:.3f}",
            f"{row['floor_seconds']:.3f}",
            f"{row['arrived_over_floor']:.2f}",
            f"{row['over_floor']:.2f}",
            f"{row['gather_seconds']:.3f}",
            f"{row['gather_over_ours']:.2f}",
            ", ".join(f"{n / 1e6:.0f}" for n in row["out_of_each_trainer_rank"]),
            ", ".join(f"{n / 1e6:.0f}" for n in row["into_each_worker"]),
            ", ".join(f"{n / 1e6:.0f}" for n in row["gather_into_each_worker"]),
            f"{row['connect_seconds']:.2f}",
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
