"""A party of a transfer dies, stalls or comes back: the workers keep the old weights, bit for bit, and take the next
good update; nobody waits much longer than the limit."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.distributed.transfer_parties import (
    LIMIT,
    NEW,
    NEXT,
    OLD,
    SLACK,
    have,
    layout,
    make,
    takes_the_next_good_update,
)
from titan_bridge.sharding.layout import Layout
from titan_bridge.testing_processes import PlainClient
from titan_bridge.testing_samples import differences, sample_dtensors
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.worker import Worker

pytestmark = pytest.mark.distributed


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_while_sending(rank: int, world: int, client: PlainClient, victim: int) -> tuple[str, float]:
    trainer, _ = make(rank, world, client, NEW)
    if rank == victim:
        trainer.source.act = kill_myself
    started = time.monotonic()
    with pytest.raises(TransferError) as error:
        trainer.send()
    return str(error.value), time.monotonic() - started


@pytest.mark.parametrize("victim", [0, 1])
def test_a_trainer_rank_is_killed_while_it_sends(mortal, trainers, workers, victim):
    answers = mortal.start(dies_while_sending, workers, victim)
    with pytest.raises(RuntimeError, match=f"rank {victim}: died"):
        answers()
    workers.call(idle)
    assert have(workers, OLD)
    takes_the_next_good_update(trainers, workers)


def idle(worker: Worker) -> None:
    """Answered once the worker is out of whatever it was called for."""


class DyingClient(PlainClient):
    """Kills the trainer when it is about to call, or has just called, a method."""

    fatal = ""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if self.fatal == "before finish":
            kill_myself()
        super().finish_weight_update(weight_version)


def dies_before_finish(rank: int, world: int, client: DyingClient) -> None:
    client.fatal = "before finish" if rank == 0 else ""
    trainer, _ = make(rank, world, client, NEW)
    with pytest.raises(TransferError):
        trainer.send()


def test_the_trainer_dies_between_its_decision_and_finish(mortal, trainers, workers):
    with pytest.raises(RuntimeError, match="rank 0: died"):
        mortal.run(dies_before_finish, DyingClient(workers.addresses))
    assert have(workers, OLD)
    # The session may be open in the engine, and the next trainer closes it.
    takes_the_next_good_update(trainers, workers)


def test_a_finish_that_reaches_the_workers_after_the_trainer_died_changes_none(mortal, trainers, workers):
    with pytest.raises(RuntimeError, match="rank 0: died"):
        mortal.run(dies_before_finish, DyingClient(workers.addresses))
    with pytest.raises(RuntimeError, match="the update was not taken"):
        workers.finish_weight_update()
    assert have(workers, OLD)
    takes_the_next_good_update(trainers, workers)


def stalls(rank: int, world: int, client: PlainClient, slow: int) -> tuple[str, float]:
    trainer, held = make(rank, world, client, NEW)
    if rank == slow:
        trainer.source.act = lambda: time.sleep(LIMIT + SLACK)
    started = time.monotonic()
    with pytest.raises(TransferError) as error:
        trainer.send()
    taken = time.monotonic() - started
    if rank == 0:
        assert client.call(differences, OLD) == [[], []]
    held |= sample_dtensors(Layout.from_json(layout(world, 0)), rank, NEXT)
    time.sleep(max(0.0, started + LIMIT + SLACK - time.monotonic()))
    trainer.send()  # the same trainer, over a new connection
    trainer.close()
    return str(error.value), taken


def test_a_trainer_rank_stalls(trainers, workers):
    (reason, taken), _ = trainers.run(stalls, workers, 1)
    assert "time limit" in reason
    assert taken < LIMIT + SLACK
    assert have(workers, NEXT)


def frozen_worker(rank: int, world: int, client: PlainClient, pid: int) -> float:
    trainer, held = make(rank, world, client, NEW)
    if rank == 0:
        os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(TransferError):
        trainer.send()
    taken = time.monotonic() - started
    if rank == 0:
        os.kill(pid, signal.SIGCONT)
        client.call(idle)
        assert client.call(differences, OLD) == [[], []]
    held |= sample_dtensors(Layout.from_json(layout(world, 0)), rank, NEXT)
    trainer.send()
    trainer.close()
    return taken


def test_a_worker_freezes_and_comes_back(trainers, processes, workers):
    taken, _ = trainers.run(frozen_worker, workers, processes[1][1].pid)
    assert taken < LIMIT + SLACK
    assert have(workers, NEXT)


def good_then_gone(rank: int, world: int, client: PlainClient) -> None:
    trainer, _ = make(rank, world, client, NEW)
    trainer.send()
    kill_myself()


def test_the_trainer_is_started_again(mortal, trainers, workers):
    with pytest.raises(RuntimeError, match="died"):
        mortal.run(good_then_gone, workers)
    assert have(workers, NEW)
    takes_the_next_good_update(trainers, workers)
