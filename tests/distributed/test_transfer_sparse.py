"""Sparse updates between real processes: equal, bit for bit, to what a dense update leaves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from titan_bridge.errors import BridgeError
from titan_bridge.ports import free_port
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.transfer.changes import changed
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.plain import (
    PlainClient,
    PlainRanks,
    plain_ranks,
    plain_workers,
    retarget,
)
from titan_bridge.transfer.receiver import Receiver
from titan_bridge.transfer.samples import sample_dtensors, sample_target
from titan_bridge.transfer.source import TensorSource
from titan_bridge.transfer.sparse import Patch
from titan_bridge.transfer.trainer import Trainer

pytestmark = pytest.mark.distributed

SHAPES = {"experts": (4, 24, 16), "wqkv": (48, 40), "wo": (40, 48), "norm": (40,)}


def layout(mesh: tuple[int, ...], placements: dict[str, tuple], dtype: str) -> dict:
    """`dtype` "mixed": bfloat16, and the norm in float32."""
    params = {
        name: ParamLayout(
            spec=ShardingSpec(mesh="m", placements=placements[name]),
            shape=shape,
            dtype={"mixed": "float32" if name == "norm" else "bfloat16"}.get(dtype, dtype),
        )
        for name, shape in SHAPES.items()
    }
    axes = ("a", "b", "c")[: len(mesh)]
    return Layout(meshes={"m": MeshLayout.make(axes, mesh)}, params=params).to_json()


R, S0, S1 = Replicate(), Shard(0), Shard(1)
SS = _StridedShard(0, split_factor=2)
TRAINERS = {
    "fsdp 2": ((2,), {"experts": (S0,), "wqkv": (S0,), "wo": (S0,), "norm": (S0,)}),
    "fsdp 2 x tp 2": ((2, 2), {"experts": (S1, S0), "wqkv": (SS, S0), "wo": (S0, S1), "norm": (S0, R)}),
    "hsdp 2 x 2": ((2, 2), {"experts": (R, S0), "wqkv": (R, S0), "wo": (R, S0), "norm": (R, S0)}),
}
ENGINES = {
    "tp 2": ((2,), {"experts": (S1,), "wqkv": (S0,), "wo": (S1,), "norm": (R,)}),
    "ep 2": ((2,), {"experts": (S0,), "wqkv": (R,), "wo": (R,), "norm": (R,)}),
}


@pytest.fixture(scope="module")
def trainers() -> Iterator[PlainRanks]:
    with plain_ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def workers() -> Iterator[PlainClient]:
    nothing = Layout(meshes={}, params={}).to_json()
    with plain_workers(sample_target, [(nothing, rank, rank, 2, 0) for rank in range(2)]) as (client, _):
        yield client


def engine_of(workers: PlainClient, name: str, dtype: str = "bfloat16") -> None:
    served = layout(*ENGINES[name], dtype)
    workers.call(retarget, sample_target, [(served, rank, rank, 2, 0) for rank in range(2)])


def live_bytes(receiver: Receiver) -> dict[str, bytes]:
    return {
        name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in receiver.target.tensors().items()
    }


def make(rank: int, world: int, port: int, client: PlainClient, told: dict) -> tuple[Trainer, dict]:
    held = sample_dtensors(Layout.from_json(told), rank, 1)
    options = Options(port=port, seconds=20, bucket_bytes=1024)
    trainer = Trainer(TensorSource(lambda: held, rank=rank), client, rank=rank, world=world, options=options)
    trainer.connect()
    return trainer, held


def optimizer_steps(rank: int, world: int, port: int, client: PlainClient, told: dict) -> None:
    """Three AdamW steps on fp32 masters, each sent as what changed for the engine, against a dense update."""
    trainer, held = make(rank, world, port, client, told)
    params = [torch.nn.Parameter(tensor) for tensor in held.values()]
    held = dict(zip(held, params, strict=True))
    trainer.source = TensorSource(lambda: held, rank=rank)
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    trainer.send_weights()
    snapshot = trainer.snapshot()
    served = trainer.sides.destination.params
    assert {name: str(t.dtype) for name, t in snapshot.local.items()} == {
        name: f"torch.{served[name].dtype}" for name in held
    }
    for step in range(3):
        for param in params:
            # Replicas have the same gradient, as after a real backward.
            whole = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
            whole *= torch.rand(param.shape, generator=torch.Generator().manual_seed(step + 9)) < 0.05
            param.grad = DTensor.from_local(
                _slice(whole, param), param.device_mesh, param.placements, run_check=False, shape=param.shape,
                stride=whole.stride(),
            )  # fmt: skip
        optimizer.step()
        patches = changed(snapshot, held, rank=rank)
        trainer.send_sparse(patches)
        snapshot.update(held)
        assert changed(snapshot, held, rank=rank) == []
        entries = torch.tensor(sum(len(patch.indices) for patch in patches))
        torch.distributed.all_reduce(entries)
        everything = sum(torch.Size(shape).numel() for shape in SHAPES.values())
        # In float32 the decay of the weights changes all of them, in bfloat16 few.
        assert entries == everything if served["wqkv"].dtype == "float32" else 0 < entries < everything
        if rank == 0:
            sparse = client.call(live_bytes)
        trainer.send_weights()
        if rank == 0:
            assert client.call(live_bytes) == sparse
    trainer.shutdown()


def _slice(whole: torch.Tensor, param: DTensor) -> torch.Tensor:
    mesh = MeshLayout.make(param.device_mesh.mesh_dim_names, param.device_mesh.shape)
    spec = ShardingSpec(mesh="m", placements=param.placements)
    local = torch.empty(param.to_local().shape)
    for piece in spec.pieces(whole.shape, mesh.shape, param.device_mesh.get_coordinate()):
        local[piece.local.slices] = whole[piece.box.slices]
    return local


@pytest.mark.parametrize(
    ("trainer", "engine", "dtype"),
    [
        *((trainer, engine, "bfloat16") for engine in ENGINES for trainer in TRAINERS),
        ("fsdp 2", "tp 2", "float32"),
        ("fsdp 2", "tp 2", "mixed"),
    ],
)
def test_optimizer_steps_equal_dense_updates(trainers, workers, trainer, engine, dtype):
    engine_of(workers, engine, dtype)
    mesh, placements = TRAINERS[trainer]
    told = layout(mesh, placements, "float32")
    trainers.run(optimizer_steps, free_port(), workers, told, world=torch.Size(mesh).numel())


def on_the_wire(rank: int, world: int, port: int, client: PlainClient, told: dict) -> tuple[int, int]:
    trainer, _ = make(rank, world, port, client, told)
    trainer.send_weights("a")
    indices = torch.randperm(48 * 40)[:1000] if rank == 0 else torch.zeros(0, dtype=torch.int64)
    report = trainer.send_sparse([Patch(name="wqkv", indices=indices, values=torch.ones(len(indices)))], "b")
    trainer.shutdown()
    return sum(report.sent[rank]), len(indices)


def test_bytes_on_the_wire(trainers, workers):
    engine_of(workers, "tp 2")
    told = layout(*TRAINERS["fsdp 2"], "float32")
    (sent, entries), (nothing, _) = trainers.run(on_the_wire, free_port(), workers, told, world=2)
    # An int32 and a bf16 an entry; two headers of 24 bytes, and 8 bytes to each of two workers that say "nothing".
    assert sent == entries * 6 + 2 * 24
    assert nothing == 16
    assert sent + nothing <= entries * 6 * 1.02


def mistakes(rank: int, world: int, port: int, client: PlainClient, told: dict, what: str) -> str:
    trainer, _ = make(rank, world, port, client, told)
    one = Patch(name="wo", indices=torch.tensor([5 + rank]), values=torch.ones(1))
    if what == "no base":
        with pytest.raises(BridgeError) as error:
            trainer.send_sparse([one])
        return str(error.value)
    trainer.send_weights()
    before = client.call(live_bytes) if rank == 0 else None
    base, patches = None, [one]
    if what == "two ranks":
        patches = [Patch(name="wo", indices=torch.tensor([5]), values=torch.ones(1))]
    elif what == "one rank, two patches" and rank == 1:
        patches = [one, one]
    elif what == "outside" and rank == 1:
        patches = [Patch(name="wo", indices=torch.tensor([40 * 48]), values=torch.ones(1))]
    elif what == "base":
        base = "another"
    with pytest.raises((BridgeError, TransferError)) as error:
        trainer.send_sparse(patches, base=base)
    if rank == 0:
        assert client.call(live_bytes) == before
    trainer.send_sparse([one])  # the next good one is taken
    if rank == 0:
        assert client.call(live_bytes) != before
    trainer.shutdown()
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("two ranks", "patch for wo: index 5 is given twice"),
        ("one rank, two patches", "patch for wo: index 6 is given twice"),
        ("outside", "trainer rank 1: patch for wo: index 1920 is outside a tensor of 1920 elements"),
        ("base", "patches for version 'another', but worker 0 has '1'"),
        ("no base", "call send_weights first"),
    ],
)
def test_mistakes_change_nothing(trainers, workers, what, reason):
    engine_of(workers, "ep 2")
    told = layout(*TRAINERS["fsdp 2"], "float32")
    for answer in trainers.run(mistakes, free_port(), workers, told, what, world=2):
        assert reason in answer
