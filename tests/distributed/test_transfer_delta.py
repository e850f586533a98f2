"""Deltas between real processes: equal, bit for bit, to what an update of all weights leaves."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.testing_processes import PlainClient, retarget
from titan_bridge.testing_samples import sample_dtensors, sample_target
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.source import TensorSource
from titan_bridge.transfer.trainer import Trainer
from titan_bridge.transfer.worker import Worker

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


def engine_of(pair: PlainClient, name: str, dtype: str = "bfloat16") -> None:
    served = layout(*ENGINES[name], dtype)
    pair.call(retarget, sample_target, [(served, rank, rank, 0) for rank in range(2)])


def live_bytes(worker: Worker) -> dict[str, bytes]:
    return {
        name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in worker.target.tensors().items()
    }


def make(rank: int, world: int, client: PlainClient, told: dict) -> tuple[Trainer, dict]:
    held = sample_dtensors(Layout.from_json(told), rank, 1)
    trainer = Trainer(lambda: held, client, options=Options(seconds=60, bucket_bytes=1024))
    trainer.connect()
    return trainer, held


def optimizer_steps(rank: int, world: int, client: PlainClient, told: dict) -> list[tuple[str, int, int]]:
    """Three AdamW steps on fp32 masters, each sent as what changed for the engine, against all weights."""
    trainer, held = make(rank, world, client, told)
    params = [torch.nn.Parameter(tensor) for tensor in held.values()]
    held = dict(zip(held, params, strict=True))
    trainer.source = TensorSource(lambda: held, rank=rank)
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    assert trainer.send().kind == "whole"
    reports = []
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
        report = trainer.send()
        reports.append((report.kind, sum(report.received.values()), report.lower_bound))
        assert trainer.verify() > 0
        if rank == 0:
            delta = client.call(live_bytes)
        report = trainer.send()  # nothing has changed: the counts of nothing
        assert report.kind == "delta"
        assert sum(report.received.values()) < report.lower_bound / 20
        trainer.send(whole=True)
        if rank == 0:
            assert client.call(live_bytes) == delta
    trainer.close()
    return reports


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
def test_optimizer_steps_equal_whole_updates(ranks, pair, trainer, engine, dtype):
    engine_of(pair, engine, dtype)
    mesh, placements = TRAINERS[trainer]
    told = layout(mesh, placements, "float32")
    for reports in ranks.run(optimizer_steps, pair, told, world=torch.Size(mesh).numel()):
        for kind, received, lower_bound in reports:
            # In float32 the decay of the weights changes all of them, in bfloat16 few.
            assert kind == ("whole" if dtype == "float32" else "delta")
            assert received == lower_bound if kind == "whole" else received < lower_bound


def on_the_wire(rank: int, world: int, client: PlainClient, told: dict) -> tuple[dict, dict]:
    trainer, held = make(rank, world, client, told)
    trainer.send("a")
    report = trainer.send("nothing")
    if rank == 0:
        held["wqkv"].to_local().view(-1)[:200] = 5.0
    nothing, report = report.sent[rank], trainer.send("b")
    trainer.close()
    return nothing, report.sent[rank]


def test_bytes_on_the_wire(ranks, pair):
    engine_of(pair, "tp 2")
    told = layout(*TRAINERS["fsdp 2"], "float32")
    (nothing, sent), (other, still) = ranks.run(on_the_wire, pair, told, world=2)
    assert still == other
    # An int32 and a bf16 an element; beside them four bytes a slice, whatever has changed.
    assert sum(sent.values()) == sum(nothing.values()) + 200 * 6


def reload(worker: Worker) -> None:
    """Other weights come in by another way, as by vLLM's `reload_weights`."""
    for tensor in worker.target.tensors().values():
        tensor.zero_()


def stale(rank: int, world: int, client: PlainClient, told: dict, how: str) -> list[str]:
    trainer, held = make(rank, world, client, told)
    kinds = [trainer.send().kind]
    held["wo"].to_local().view(-1)[:9] += 1
    kinds.append(trainer.send().kind)
    if rank == 0:
        if how == "reload":
            client.call(reload)
        elif how == "restart":
            served = layout(*ENGINES["ep 2"], "bfloat16")
            client.call(retarget, sample_target, [(served, at, at, 0) for at in range(2)])
        else:
            client.shutdown_weight_transfer_engine()
            other = Trainer({n: torch.zeros(s) for n, s in SHAPES.items()}, client, rank=0, world=1)
            other.send()
            other.close()
    torch.distributed.barrier()
    held["wo"].to_local().view(-1)[:9] += 1
    kinds.append(trainer.send().kind)
    held["wo"].to_local().view(-1)[:9] += 1
    kinds.append(trainer.send().kind)
    trainer.verify()
    trainer.close()
    return kinds


@pytest.mark.parametrize("how", ["reload", "restart", "another trainer"])
def test_a_stale_base_is_refused_and_everything_sent_instead(ranks, pair, how):
    engine_of(pair, "ep 2")
    told = layout(*TRAINERS["fsdp 2"], "float32")
    for kinds in ranks.run(stale, pair, told, how, world=2):
        assert kinds == ["whole", "delta", "whole", "delta"]


class Reloading(PlainClient):
    """Other weights are loaded when an update has arrived and is about to be taken."""

    now = False

    def start_weight_update(self) -> None:
        if self.now:
            self.call(reload)
        super().start_weight_update()


def overtaken(rank: int, world: int, client: PlainClient, told: dict) -> list[str]:
    mine = Reloading(client.addresses)
    trainer, held = make(rank, world, mine, told)
    trainer.send()
    held["wo"].to_local().view(-1)[:9] += 1
    mine.now = rank == 0
    with pytest.raises(TransferError) as error:
        trainer.send()
    if rank == 0:
        assert {bytes(t) for live in client.call(live_bytes) for t in map(set, live.values())} == {b"\0"}
    mine.now = False
    kind = trainer.send().kind
    trainer.verify()
    trainer.close()
    return [str(error.value), kind]


def test_weights_that_are_loaded_before_a_delta_is_taken_end_it(ranks, pair):
    engine_of(pair, "tp 2")
    for error, kind in ranks.run(overtaken, pair, layout(*TRAINERS["fsdp 2"], "float32"), world=2):
        assert "got other weights while a delta was on its way" in error
        assert kind == "whole"


def lost(rank: int, world: int, client: PlainClient, told: dict) -> list[str]:
    """Verify names what is not the trainer's, and one more update puts it right."""
    trainer, _ = make(rank, world, client, told)
    trainer.send()
    if rank == 0:
        client.call(flip)
    torch.distributed.barrier()
    reasons = []
    for _ in range(2):
        with pytest.raises(TransferError) as error:
            trainer.verify()
        reasons.append(str(error.value))
    trainer.send(whole=True)
    trainer.verify()
    trainer.close()
    return reasons


def flip(worker: Worker) -> None:
    """One bit, of one element, on one worker."""
    if worker.target.index == 1:
        worker.target.tensors()["wo"].view(-1).view(torch.int16)[77] ^= 1


def test_verify_names_the_tensor_and_the_worker(ranks, pair):
    engine_of(pair, "tp 2")
    told = layout(*TRAINERS["fsdp 2"], "float32")
    for reasons in ranks.run(lost, pair, told, world=2):
        assert reasons == ["wo on engine0/1 is not what the trainer has (0 more such tensors)"] * 2
