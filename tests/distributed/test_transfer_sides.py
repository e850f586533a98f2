"""Sides with more than one part: a trainer in pipeline stages, and several engines behind one client."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from titan_bridge.ports import free_port
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.fanout import FanOutClient
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.plain import PlainClient, plain_ranks, plain_workers
from titan_bridge.transfer.receiver import Receiver
from titan_bridge.transfer.samples import differences, sample, sample_locals, sample_target
from titan_bridge.transfer.source import TensorSource
from titan_bridge.transfer.target import Target
from titan_bridge.transfer.trainer import Trainer

pytestmark = pytest.mark.distributed

OLD, NEW, NEXT = 3, 4, 5
SHAPES = {
    "embed": (48, 16),
    **{f"layers.{i}": (16, 48) for i in range(4)},
    "norm": (16,),
    "big": (4096, 1024),
}


def served(ranks: int) -> dict:
    placements = {
        name: Shard(len(shape) - 1) if len(shape) > 1 else Replicate() for name, shape in SHAPES.items()
    }
    return Layout(
        meshes={"m": MeshLayout.make(("tp",), (ranks,))},
        params={
            name: ParamLayout(
                spec=ShardingSpec(mesh="m", placements=(placements[name],)), shape=shape, dtype="bfloat16"
            )
            for name, shape in SHAPES.items()
        },
    ).to_json()


STAGES = (("embed", "layers.0", "layers.1"), ("layers.2", "layers.3", "norm", "big", "embed"))
"""Tied embeddings lie in the first stage and in the last."""


def staged(rank: int, world: int, port: int, client: PlainClient) -> int:
    """Two stages of two FSDP ranks, fp32; returns the bytes that this rank sent."""
    fsdp = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "fsdp"))["fsdp"]

    def held(version: int) -> dict[str, torch.Tensor]:
        return {
            name: DTensor.from_local(
                sample(name, SHAPES[name], version).chunk(world // 2)[rank % 2],
                fsdp,
                [Shard(0)],
                run_check=False,
            )
            for name in STAGES[rank // 2]
        }

    now = held(NEW)
    options = Options(port=port, seconds=30)
    trainer = Trainer(TensorSource(lambda: now, rank=rank), client, rank=rank, world=world, options=options)
    trainer.connect()
    for version in (NEW, NEXT):
        now.update(held(version))
        report = trainer.send_weights()
        if rank == 0:
            assert client.call(differences, version) == [[], []]
            assert sum(report.received.values()) == report.lower_bound
    trainer.shutdown()
    return sum(report.sent[rank])


def test_every_pipeline_stage_sends_what_it_holds():
    rows = [(served(2), rank, rank, 2, OLD) for rank in range(2)]
    with plain_workers(sample_target, rows) as (client, _), plain_ranks(4) as ranks:
        sent = ranks.run(staged, free_port(), client)
    assert min(sent) > 0


def widen(receiver: Receiver) -> None:
    """A worker whose live tensor is not what it was."""
    live = dict(receiver.target.tensors())
    live["layers.1"] = live["layers.1"].double()
    receiver.target = Target(**{**vars(receiver.target), "tensors": lambda: live})


def restore(receiver: Receiver) -> None:
    receiver.target = sample_target(receiver.target.layout.to_json(), 0, 0, 1, NEW)


def test_two_engines_take_an_update_together_or_not_at_all():
    whole = Layout.from_json(served(1))
    with plain_workers(sample_target, [(served(1), 0, 0, 1, OLD)] * 2) as (client, _):
        engines = [PlainClient([address]) for address in client.addresses]
        now = sample_locals(whole, 0, NEW)
        options = Options(seconds=10)
        trainer = Trainer(
            TensorSource(lambda: now, rank=0), FanOutClient(engines), rank=0, world=1, options=options
        )
        trainer.connect()
        report = trainer.send_weights("first")
        assert client.call(differences, NEW) == [[], []]
        assert [engine.version for engine in engines] == ["first", "first"]
        assert set(report.received) == {0, 1}

        now.update(sample_locals(whole, 0, NEXT))
        engines[1].call(widen)
        with pytest.raises(TransferError, match=r"layers\.1 on worker 0 is .*float64"):
            trainer.send_weights("second")
        engines[1].call(restore)
        assert client.call(differences, NEW) == [[], []]

        trainer.send_weights("third")
        assert client.call(differences, NEXT) == [[], []]
        assert [engine.version for engine in engines] == ["third", "third"]
