"""What goes wrong in a transfer, between real processes: the workers keep the old weights, bit for bit, and take the
next good update; nobody waits much longer than the limit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.transfer.control import MARGIN
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.plain import PlainClient, PlainRanks, free_port, plain_ranks, plain_workers
from titan_bridge.transfer.receiver import Receiver
from titan_bridge.transfer.samples import differences, sample_dtensors, sample_locals, sample_target
from titan_bridge.transfer.source import TensorSource
from titan_bridge.transfer.target import Target
from titan_bridge.transfer.trainer import Trainer

pytestmark = pytest.mark.distributed

LIMIT = 4.0
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


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[PlainClient, list]]:
    with plain_workers(sample_target, [(layout(2, 1), rank, rank, 2, OLD) for rank in range(2)]) as started:
        yield started


@pytest.fixture
def workers(processes: tuple[PlainClient, list]) -> PlainClient:
    """Two workers with the OLD weights, connected with nobody."""
    processes[0].call(begin_anew, layout(2, 1))
    return processes[0]


def begin_anew(receiver: Receiver, told: dict) -> None:
    receiver.shutdown()
    at = receiver.target.index
    receiver.__init__(sample_target(told, at, at, 2, OLD))


@pytest.fixture
def mortal() -> Iterator[PlainRanks]:
    """Trainer ranks that a test may kill."""
    with plain_ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def trainers() -> Iterator[PlainRanks]:
    with plain_ranks(2) as ranks:
        yield ranks


class Trap(dict):
    """Local tensors; `act` happens when the n-th is taken for sending."""

    def __init__(self, tensors: dict, act, n: int) -> None:
        super().__init__(tensors)
        self._act, self._n = act, n

    def __getitem__(self, name: str) -> torch.Tensor:
        self._n -= 1
        if self._n == 0:
            self._act()
        return super().__getitem__(name)


class Source(TensorSource):
    """A source with a trap in it."""

    act = None

    def local(self):
        tensors, act, self.act = super().local(), self.act, None
        return tensors if act is None else Trap(tensors, act, 4)


def make(rank: int, world: int, port: int, client: PlainClient, version: int) -> tuple[Trainer, dict]:
    held = sample_dtensors(Layout.from_json(layout(world, 0)), rank, version)
    options = Options(port=port, seconds=LIMIT, bucket_bytes=BUCKET)
    trainer = Trainer(Source(lambda: held, rank=rank), client, rank=rank, world=world, options=options)
    trainer.connect()
    return trainer, held


def good(rank: int, world: int, port: int, client: PlainClient, version: int) -> None:
    trainer, _ = make(rank, world, port, client, version)
    trainer.send_weights()
    trainer.shutdown()


def takes_the_next_good_update(trainers: PlainRanks, workers: PlainClient) -> None:
    trainers.run(good, free_port(), workers, NEXT)
    assert workers.call(differences, NEXT) == [[], []]


def have(workers: PlainClient, version: int) -> bool:
    return workers.call(differences, version) == [[], []]


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_while_sending(
    rank: int, world: int, port: int, client: PlainClient, victim: int
) -> tuple[str, float]:
    trainer, _ = make(rank, world, port, client, NEW)
    if rank == victim:
        trainer.source.act = kill_myself
    started = time.monotonic()
    with pytest.raises(TransferError) as error:
        trainer.send_weights()
    return str(error.value), time.monotonic() - started


@pytest.mark.parametrize("victim", [0, 1])
def test_a_trainer_rank_is_killed_while_it_sends(mortal, trainers, workers, victim):
    answers = mortal.start(dies_while_sending, free_port(), workers, victim)
    with pytest.raises(RuntimeError, match=f"rank {victim}: died"):
        answers()
    workers.call(idle)
    assert have(workers, OLD)
    takes_the_next_good_update(trainers, workers)


def idle(receiver: Receiver) -> None:
    """Answered once the worker is out of whatever it was called for."""


class DyingClient(PlainClient):
    """Kills the trainer when it is about to call, or has just called, a method."""

    fatal = ""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if self.fatal == "before finish":
            kill_myself()
        super().finish_weight_update(weight_version)


def dies_before_finish(rank: int, world: int, port: int, client: DyingClient) -> None:
    client.fatal = "before finish" if rank == 0 else ""
    trainer, _ = make(rank, world, port, client, NEW)
    with pytest.raises(TransferError):
        trainer.send_weights()


def test_the_trainer_dies_between_its_decision_and_finish(mortal, trainers, workers):
    with pytest.raises(RuntimeError, match="rank 0: died"):
        mortal.run(dies_before_finish, free_port(), DyingClient(workers.addresses))
    assert have(workers, OLD)
    # The session is open in the engine, and the next trainer closes it.
    takes_the_next_good_update(trainers, workers)


def test_a_finish_that_reaches_the_workers_after_the_trainer_died_changes_none(mortal, trainers, workers):
    with pytest.raises(RuntimeError, match="rank 0: died"):
        mortal.run(dies_before_finish, free_port(), DyingClient(workers.addresses))
    workers.finish_weight_update()
    assert have(workers, OLD)
    takes_the_next_good_update(trainers, workers)


def change(receiver: Receiver, index: int, what: str) -> None:
    """A worker whose live tensor is not what it was."""
    if receiver.target.index != index:
        return
    live = dict(receiver.target.tensors())
    live["layer3"] = live["layer3"].double() if what == "dtype" else live["layer3"][:10].clone()
    receiver.target = Target(**{**vars(receiver.target), "tensors": lambda: live})


def restore(receiver: Receiver) -> None:
    told = receiver.target.layout.to_json()
    receiver.target = sample_target(told, receiver.target.rank, receiver.target.index, 2, OLD)


def one_worker_refuses(
    rank: int, world: int, port: int, client: PlainClient, what: str, index: int
) -> list[str]:
    trainer, held = make(rank, world, port, client, NEW)
    if rank == 0:
        client.call(change, index, what)
    reasons = []
    for _ in range(2):  # and again, over a new connection
        with pytest.raises(TransferError) as error:
            trainer.send_weights()
        reasons.append(str(error.value))
    if rank == 0:
        client.call(restore)
        assert client.call(differences, OLD) == [[], []]
    held |= sample_dtensors(Layout.from_json(layout(world, 0)), rank, NEXT)
    trainer.send_weights()
    trainer.shutdown()
    return reasons


@pytest.mark.parametrize(("what", "index"), [("dtype", 0), ("shape", 1)])
def test_one_worker_refuses_and_so_do_all(trainers, workers, what, index):
    for reasons in trainers.run(one_worker_refuses, free_port(), workers, what, index):
        assert all("layer3" in reason for reason in reasons)
    assert have(workers, NEXT)


def stalls(rank: int, world: int, port: int, client: PlainClient, slow: int) -> tuple[str, float]:
    trainer, held = make(rank, world, port, client, NEW)
    if rank == slow:
        trainer.source.act = lambda: time.sleep(LIMIT + SLACK)
    started = time.monotonic()
    with pytest.raises(TransferError) as error:
        trainer.send_weights()
    taken = time.monotonic() - started
    if rank == 0:
        assert client.call(differences, OLD) == [[], []]
    held |= sample_dtensors(Layout.from_json(layout(world, 0)), rank, NEXT)
    time.sleep(max(0.0, started + LIMIT + SLACK - time.monotonic()))
    trainer.send_weights()  # the same trainer, over a new connection
    trainer.shutdown()
    return str(error.value), taken


def test_a_trainer_rank_stalls(trainers, workers):
    (reason, taken), _ = trainers.run(stalls, free_port(), workers, 1)
    assert "Timed out" in reason
    assert taken < LIMIT + SLACK
    assert have(workers, NEXT)


def frozen_worker(rank: int, world: int, port: int, client: PlainClient, pid: int) -> float:
    trainer, held = make(rank, world, port, client, NEW)
    if rank == 0:
        os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(TransferError):
        trainer.send_weights()
    taken = time.monotonic() - started
    if rank == 0:
        os.kill(pid, signal.SIGCONT)
        client.call(idle)
        assert client.call(differences, OLD) == [[], []]
    held |= sample_dtensors(Layout.from_json(layout(world, 0)), rank, NEXT)
    trainer.send_weights()
    trainer.shutdown()
    return taken


def test_a_worker_freezes_and_comes_back(trainers, processes, workers):
    taken, _ = trainers.run(frozen_worker, free_port(), workers, processes[1][1].pid)
    assert taken < LIMIT + SLACK
    assert have(workers, NEXT)


class Disorder(PlainClient):
    """Calls the engine in an order that no trainer does."""

    order = ""

    def start_weight_update(self) -> None:
        if self.order != "no start":
            super().start_weight_update()

    def update_weights(self, update_info: dict) -> None:
        if self.order == "finish first":
            super().finish_weight_update()
        if self.order == "not connected":
            super().shutdown_weight_transfer_engine()
        super().update_weights(update_info)
        if self.order == "finish before the decision":
            super().finish_weight_update()


def wrong_order(rank: int, world: int, port: int, client: Disorder, order: str) -> str:
    trainer, held = make(rank, world, port, client, NEW)
    client.order = order
    with pytest.raises(TransferError) as error:
        trainer.send_weights()
    if rank == 0:
        assert client.call(differences, OLD) == [[], []]
    client.order = ""
    held |= sample_dtensors(Layout.from_json(layout(world, 0)), rank, NEXT)
    trainer.send_weights()
    trainer.shutdown()
    return str(error.value)


@pytest.mark.parametrize("order", ["no start", "finish first", "not connected", "finish before the decision"])
def test_a_round_in_the_wrong_order(trainers, workers, order):
    trainers.run(wrong_order, free_port(), Disorder(workers.addresses), order)
    assert have(workers, NEXT)


def lone_trainer(client: PlainClient, version: int) -> tuple[Trainer, dict]:
    held = sample_locals(Layout.from_json(layout(1, 0)), 0, version)
    trainer = Trainer(
        TensorSource(lambda: held, rank=0), client, rank=0, world=1, options=Options(seconds=LIMIT)
    )
    trainer.connect()
    return trainer, held


def two_trainers(rank: int, world: int, client: PlainClient) -> str | None:
    """Two processes, each a trainer of one rank."""
    refused = None
    if rank == 0:
        trainer, _ = lone_trainer(client, NEW)
    dist.barrier()
    if rank == 1:
        with pytest.raises(TransferError) as error:
            lone_trainer(client, OLD)
        refused = str(error.value)
    dist.barrier()
    if rank == 0:
        trainer.send_weights()
        assert client.call(differences, NEW) == [[], []]
        trainer.shutdown()
    dist.barrier()
    if rank == 1:  # the first one has left
        trainer, _ = lone_trainer(client, NEXT)
        trainer.send_weights()
    dist.barrier()
    return refused


def test_a_second_trainer_is_refused_while_the_first_one_lives(trainers, workers):
    _, refused = trainers.run(two_trainers, workers)
    assert "connected with another trainer" in refused
    assert have(workers, NEXT)


def good_then_gone(rank: int, world: int, port: int, client: PlainClient) -> None:
    trainer, _ = make(rank, world, port, client, NEW)
    trainer.send_weights()
    kill_myself()


def test_the_trainer_is_started_again(mortal, trainers, workers):
    with pytest.raises(RuntimeError, match="died"):
        mortal.run(good_then_gone, free_port(), workers)
    assert have(workers, NEW)
    takes_the_next_good_update(trainers, workers)
