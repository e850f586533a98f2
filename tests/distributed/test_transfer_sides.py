"""Sides with more than one part: a trainer in pipeline stages, and several engines behind one client."""

from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.testing_processes import PlainClient, plain_workers
from titan_bridge.testing_samples import differences, sample, sample_locals, sample_target
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.target import Target
from titan_bridge.transfer.trainer import Trainer
from titan_bridge.transfer.worker import Worker

pytestmark = pytest.mark.distributed

OLD, NEW, NEXT = 3, 4, 5
SHAPES = {
    "embed": (48, 16),
    **{f"layers.{i}": (16, 48) for i in range(4)},
    "norm": (16,),
    "big": (4096, 1024),
}


def served(ranks: int, *, stages: int = 1) -> dict:
    """An engine's layout; with two stages the layers 0 to 2 are in the first, the embedding in both."""
    width = ranks // stages
    meshes = {
        f"m{stage}": MeshLayout.make(("tp",), (width,), range(stage * width, (stage + 1) * width))
        for stage in range(stages)
    }
    both = MeshLayout.make(("pp", "tp"), (stages, width))

    def param(name: str, shape: tuple[int, ...]) -> ParamLayout:
        cut = Shard(len(shape) - 1) if len(shape) > 1 else Replicate()
        if name == "embed" and stages > 1:
            spec = ShardingSpec(mesh="both", placements=(Replicate(), cut))
        else:
            first = stages == 1 or name in ("layers.0", "layers.1", "layers.2")
            spec = ShardingSpec(mesh="m0" if first else "m1", placements=(cut,))
        return ParamLayout(spec=spec, shape=shape, dtype="bfloat16")

    return Layout(
        meshes=meshes | ({"both": both} if stages > 1 else {}),
        params={name: param(name, shape) for name, shape in SHAPES.items()},
    ).to_json()


STAGES = (("embed", "layers.0", "layers.1"), ("layers.2", "layers.3", "norm", "big", "embed"))
"""Tied embeddings lie in the first stage and in the last."""


def staged(rank: int, world: int, client: PlainClient) -> int:
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
    options = Options(seconds=30)
    trainer = Trainer(lambda: now, client, options=options)
    trainer.connect()
    for version in (NEW, NEXT):
        now.update(held(version))
        report = trainer.send()
        if rank == 0:
            assert client.call(differences, version) == [[] for _ in client.addresses]
            assert sum(report.received.values()) == report.lower_bound
    trainer.close()
    return sum(report.sent[rank].values())


@pytest.mark.parametrize("stages", [1, 2])
def test_every_pipeline_stage_sends_what_it_holds(ranks, stages):
    workers = 2 * stages
    rows = [(served(workers, stages=stages), rank, rank, OLD) for rank in range(workers)]
    with plain_workers(sample_target, rows) as (client, _):
        sent = ranks.run(staged, client)
    assert min(sent) > 0


def widen(worker: Worker) -> None:
    """A worker whose live tensor is not what it was."""
    live = dict(worker.target.tensors())
    live["layers.1"] = live["layers.1"].double()
    worker.target = Target(**{**vars(worker.target), "tensors": lambda: live})


def restore(worker: Worker) -> None:
    worker.target = sample_target(worker.target.layout.to_json(), 0, 0, NEW)


def two_engines(**options: Any) -> Iterator[tuple[Trainer, dict, list[PlainClient], list]]:
    with plain_workers(sample_target, [(served(1), 0, 0, OLD)] * 2, apart=True) as (client, processes):
        engines = [PlainClient([address]) for address in client.addresses]
        now = sample_locals(Layout.from_json(served(1)), 0, NEW)
        now["value_head"] = torch.ones(3)
        trainer = Trainer(lambda: now, engines, options=Options(**{"seconds": 10, **options}))
        yield trainer, now, engines, processes


def test_two_engines_take_an_update_together_or_not_at_all():
    for trainer, now, engines, _ in two_engines():
        report = trainer.send("first")
        assert [engine.call(differences, NEW) for engine in engines] == [[[]], [[]]]
        assert [engine.call(version) for engine in engines] == [["first"], ["first"]]
        assert report.before == {"engine0": "default", "engine1": "default"}
        assert set(report.received) == {"engine0/0", "engine1/0"}
        assert report.unused == ["value_head"]
        now.update(sample_locals(Layout.from_json(served(1)), 0, NEXT))
        engines[1].call(widen)
        with pytest.raises(TransferError, match=r"layers\.1 on worker 0 is .*float64"):
            trainer.send("second")
        failing = trainer.send("in the background", wait=False)
        with pytest.raises(TransferError):
            failing.wait()
        engines[1].call(restore)
        assert [engine.call(differences, NEW) for engine in engines] == [[[]], [[]]]
        assert trainer.send("third", wait=False).wait().version == "third"
        assert [engine.call(differences, NEXT) for engine in engines] == [[[]], [[]]]
        assert [engine.call(version) for engine in engines] == [["third"], ["third"]]
        trainer.close()


def version(worker: Worker) -> str:
    return worker.version


def test_engines_come_and_go_and_a_dead_one_is_left_out():
    for trainer, now, engines, processes in two_engines(on_dead="drop"):
        trainer.engines.remove("engine1")
        assert set(trainer.send("a").received) == {"engine0/0"}
        trainer.engines.add(engines[1], "late")
        now["norm"] += 1
        report = trainer.send("b")  # what changed for the one, everything for the other
        assert report.received["engine0/0"] < report.received["late/0"] == report.lower_bound // 2
        assert [engine.call(version) for engine in engines] == [["b"], ["b"]]
        assert trainer.verify() == 2 * len(SHAPES)
        processes[0].kill()
        processes[0].join()
        now["norm"] += 1
        report = trainer.send("c")
        assert set(report.dropped) == {"engine0"}
        assert list(trainer.engines) == ["late"]
        assert engines[1].call(version) == ["c"]
        assert trainer.verify() == len(SHAPES)
        processes[1].kill()
        processes[1].join()
        with pytest.raises(TransferError):  # there is none left
            trainer.send("d")
        trainer.close()  # nobody is there to be told


def stop_in(worker: Worker, question: str) -> None:
    """A worker that hangs as soon as it is asked this."""

    def stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)  # the signal may reach another thread before this one

    setattr(worker, f"_{question}", stop)


@pytest.mark.parametrize("question", ["hello", "check", "prepare", "receive", "state"])
def test_one_that_hangs_takes_no_time_from_the_others(question):
    for trainer, now, engines, _ in two_engines(on_dead="drop"):
        if question != "hello":
            trainer.send("a")
            now["norm"] += 1
        trainer.options = dataclasses.replace(trainer.options, seconds=3)
        engines[0].call(stop_in, question)
        report = trainer.send("b")
        assert set(report.dropped) == {"engine0"}
        assert engines[1].call(version) == ["b"]
        now["norm"] += 1
        assert trainer.send("c").dropped == {}
        assert trainer.verify() == len(SHAPES)
        trainer.close()


def test_an_update_that_one_engine_takes_and_another_refuses_is_said_to_be_live_there():
    for trainer, now, engines, _ in two_engines():

        def refuse(_: Any = None) -> None:
            raise RuntimeError("made to fail")

        engines[1].finish_weight_update = refuse
        with pytest.raises(
            TransferError, match=r"^engine1 refused: made to fail; '1' is live on engine0 all"
        ):
            trainer.send()
        del engines[1].finish_weight_update
        assert [engine.call(version) for engine in engines] == [["1"], ["default"]]
        now["norm"] += 1
        report = trainer.send()  # a version of its own, and everything to both
        assert (report.version, report.kind) == ("2", "whole")
        assert report.before == {"engine0": "1", "engine1": "default"}
        assert trainer.verify() == 2 * len(SHAPES)
        trainer.close()


def test_all_replicas_of_a_dense_engine_are_updated_or_the_call_fails():
    """Each steps by itself and knows only its own number, as with vLLM's data parallelism of dense models."""
    rows = [(served(1), 0, index, OLD) for index in range(2)]
    with plain_workers(sample_target, rows, apart=True) as (client, processes):
        now = sample_locals(Layout.from_json(served(1)), 0, NEW)
        with Trainer(lambda: now, client, options=Options(seconds=60)) as trainer:
            report = trainer.send()
            assert client.call(differences, NEW) == [[], []]
            assert set(report.received) == {"engine0/0", "engine0/1"}
            assert trainer.verify() == 2 * len(SHAPES)
        processes[0].kill()
        processes[0].join()
        rest = PlainClient(client.addresses[1:])
        now.update(sample_locals(Layout.from_json(served(1)), 0, NEXT))
        with (
            Trainer(lambda: now, rest, options=Options(seconds=10)) as trainer,
            pytest.raises(TransferError, match=r"workers \[1\] of engine0 came; all of them have to"),
        ):
            trainer.send()
        assert rest.call(differences, NEW) == [[]]


def big() -> dict:
    placements = (Shard(0),)
    spec = ShardingSpec(mesh="m", placements=placements)
    param = ParamLayout(spec=spec, shape=(4096, 4096), dtype="float32")
    return Layout(meshes={"m": MeshLayout.make(("tp",), (1,))}, params={"w": param}).to_json()


def repeated(rank: int, world: int, client: PlainClient, folder: str) -> tuple[list[float], list[float]]:
    """Seconds of updates in peace, and while strangers knock."""
    now = {"w": torch.ones(4096, 4096)}
    with Trainer(lambda: now, client, options=Options(seconds=60, delta=False)) as trainer:
        trainer.send()
        peace = [trainer.send().seconds for _ in range(8)]
        Path(folder, "port.part").write_text(str(trainer._listener.port))
        Path(folder, "port.part").rename(Path(folder, "port"))
        war = []
        while not Path(folder, "over").exists():
            war.append(trainer.send().seconds)
        trainer.verify()
    return peace, war


def test_two_thousand_strangers_during_updates_neither_fail_nor_slow_them(ranks, tmp_path):
    with plain_workers(sample_target, [(big(), 0, 0, OLD)]) as (client, _):
        answers = ranks.start(repeated, client, str(tmp_path), world=1)
        while not (tmp_path / "port").exists():
            time.sleep(0.01)
        port = int((tmp_path / "port").read_text())
        for number in range(2000):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
                if number % 2:
                    stranger.sendall(secrets.token_bytes(500))
            time.sleep(0.001)
        (tmp_path / "over").touch()
        ((peace, war),) = answers()
    print(
        f"median {statistics.median(peace):.3f} s in peace, {statistics.median(war):.3f} s of {len(war)} updates"
    )
    assert len(war) > 2
    # Quartiles: the strangers' own work is on the same cores, and so is everybody else's on a shared machine.
    # A stranger that is waited for would cost seconds.
    assert statistics.quantiles(war)[0] < 2 * statistics.quantiles(peace)[2] + 0.25
