"""Two trainer ranks and two workers for the tests of what goes wrong in a transfer; conftest.py starts them."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import Replicate, Shard

from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.testing_processes import PlainClient, PlainRanks, restart
from titan_bridge.testing_samples import TrappedSource, differences, sample_dtensors, sample_target
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.protocol import MARGIN
from titan_bridge.transfer.trainer import Trainer
from titan_bridge.transfer.worker import Worker

LIMIT = 60.0
"""Of what does not wait for anybody who is away: generous, for a busy machine."""
SLACK = 5 * MARGIN
"""What the slowest step of giving up may take beyond the limit."""
BUCKET = 4096
OLD, NEW, NEXT = 7, 8, 9


def layout(ranks: int, dim: int) -> dict:
    def param(*shape: int, placement: object) -> ParamLayout:
        return ParamLayout(spec=ShardingSpec(mesh="m", placements=(placement,)), shape=shape, dtype="float32")

    return Layout(
        meshes={"m": MeshLayout.make(("axis",), (ranks,))},
        params={
            **{f"layer{i}": param(64, 48, placement=Shard(dim)) for i in range(6)},
            "norm": param(48, placement=Replicate()),
        },
    ).to_json()


def begin_anew(worker: Worker, told: dict) -> None:
    at = worker.target.index
    restart(worker, sample_target(told, at, at, OLD))


def make(rank: int, world: int, client: PlainClient, version: int, **options: Any) -> tuple[Trainer, dict]:
    held = sample_dtensors(Layout.from_json(layout(world, 0)), rank, version)
    given = Options(**{"seconds": LIMIT, "bucket_bytes": BUCKET, **options})
    trainer = Trainer(TrappedSource(lambda: held, rank=rank), client, options=given)
    trainer.connect()
    return trainer, held


def good(rank: int, world: int, client: PlainClient, version: int) -> None:
    trainer, _ = make(rank, world, client, version)
    trainer.send()
    trainer.close()


def takes_the_next_good_update(trainers: PlainRanks, workers: PlainClient) -> None:
    trainers.run(good, workers, NEXT)
    assert workers.call(differences, NEXT) == [[], []]


def have(workers: PlainClient, version: int) -> bool:
    return workers.call(differences, version) == [[], []]
