"""What comes after a trainer's death; each fault at each step is in test_transfer_fault_table.py."""

from __future__ import annotations

import os
import signal

import pytest

from tests.distributed.transfer_parties import (
    NEW,
    OLD,
    have,
    make,
    takes_the_next_good_update,
)
from titan_bridge.testing_processes import PlainClient
from titan_bridge.transfer.errors import TransferError

pytestmark = pytest.mark.distributed


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


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


def test_a_finish_that_reaches_the_workers_after_the_trainer_died_changes_none(mortal, trainers, workers):
    with pytest.raises(RuntimeError, match="rank 0: died"):
        mortal.run(dies_before_finish, DyingClient(workers.addresses))
    with pytest.raises(RuntimeError, match="the update was not taken"):
        workers.finish_weight_update()
    assert have(workers, OLD)
    takes_the_next_good_update(trainers, workers)


def good_then_gone(rank: int, world: int, client: PlainClient) -> None:
    trainer, _ = make(rank, world, client, NEW)
    trainer.send()
    kill_myself()


def test_the_trainer_is_started_again(mortal, trainers, workers):
    with pytest.raises(RuntimeError, match="died"):
        mortal.run(good_then_gone, workers)
    assert have(workers, NEW)
    takes_the_next_good_update(trainers, workers)
