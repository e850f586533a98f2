"""Every fault at every step, to every party: the workers keep the old weights on both or take the new ones on both,
nobody waits much longer than the limit, and the next update works. `TITAN_FAULTS=FILE` writes the table of outcomes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.transfer_parties import (
    LIMIT,
    NEW,
    NEXT,
    OLD,
    SLACK,
    layout,
    make,
    takes_the_next_good_update,
)
from titan_bridge.sharding.layout import Layout
from titan_bridge.testing_processes import PlainClient, PlainRanks, plain_workers
from titan_bridge.testing_samples import differences, sample_dtensors, sample_target
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.protocol import MARGIN
from titan_bridge.transfer.trainer import Trainer
from titan_bridge.transfer.wire import Deadline
from titan_bridge.transfer.worker import Worker

pytestmark = pytest.mark.distributed

SECONDS = 1.5
STOPPED = SECONDS + 1.5
WORKER_STOPPED = STOPPED + MARGIN  # answers are waited for a little longer


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(party: Trainer | Worker) -> None:
    """SIGSTOP, and SIGCONT when everybody else has given up."""
    seconds = WORKER_STOPPED if isinstance(party, Worker) else STOPPED
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def slow(*_: Any) -> None:
    time.sleep(SECONDS / 3)


def connections(party: Trainer | Worker) -> list[Any]:
    if isinstance(party, Worker):
        return [party._link.control, *party._link.data.values()]
    return [
        *party._ranks._others.values(),
        *(connection for engine in party.engines.values() for connection in engine.workers),
        *(way.connection for way in party._ways.values()),
    ]


def cut(party: Trainer | Worker) -> None:
    for connection in connections(party):
        connection.close()


def garbage(party: Trainer | Worker) -> None:
    for connection in connections(party):
        with contextlib.suppress(TransferError):
            connection.send_raw(
                b"\xff" + secrets.token_bytes(100_000), Deadline(30)
            )  # no length that is waited for


ACTS: dict[str, Callable[[Any], None]] = {
    "kill -9": kill, "SIGSTOP": stop, "slow": slow, "cut": cut, "garbage": garbage,
}  # fmt: skip
EXCHANGES = {"handshake": 1, "prepare": 2, "vote": 3}


def arm_trainer(trainer: Trainer, step: str, act: str) -> None:
    if step == "send":
        trainer.source.act = lambda: ACTS[act](trainer)
        return
    if step == "commit":
        trainer.engines["engine0"].client.act = lambda: ACTS[act](trainer)
        return
    exchange = trainer._ranks.exchange

    def acting(*given: Any, **more: Any) -> Any:
        if trainer._ranks._step + 1 == EXCHANGES[step]:
            trainer._ranks.exchange = exchange
            ACTS[act](trainer)
        return exchange(*given, **more)

    trainer._ranks.exchange = acting


def arm_worker(worker: Worker, index: int, step: str, act: str) -> None:
    if worker.target.index != index:
        return
    if step == "commit":
        agree = worker.target.agree

        def acting(mine: Any) -> Any:
            worker.target = dataclasses.replace(worker.target, agree=agree)
            ACTS[act](worker)
            return agree(mine)

        worker.target = dataclasses.replace(worker.target, agree=acting)
        return
    name = {"handshake": "_join", "prepare": "_prepare", "send": "_receive"}[step]

    def before(*given: Any) -> Any:
        del worker.__dict__[name]
        ACTS[act](worker)
        return getattr(worker, name)(*given)

    setattr(worker, name, before)


class Client(PlainClient):
    """Acts once before it finishes an update."""

    act: Callable[[], None] | None = None

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        act, self.act = self.act, None
        if act is not None:
            act()
        super().finish_weight_update()


def update(
    rank: int,
    world: int,
    client: Client,
    victim: str,
    step: str,
    act: str,
    over: str,
    spare: PlainClient | None,
) -> tuple[str, float]:
    """One update with a fault in it, and another by the same trainers. Returns the error, and the seconds to it."""
    trainer, held = make(rank, world, client, NEW, transport=over)
    usual = trainer.options
    if act == "SIGSTOP" or (victim, step) == (
        "rank 1",
        "handshake",
    ):  # others show at once, whatever the limit is
        trainer.options = dataclasses.replace(usual, seconds=SECONDS)
    if victim == "worker" and step == "handshake":
        trainer._coordinator.close()
        trainer._ways.clear()
    if rank == 0 and victim == "worker":
        client.call(arm_worker, 1, step, act)
    if victim == f"rank {rank}":
        arm_trainer(trainer, step, act)
    said, started = "", time.monotonic()
    try:
        trainer.send("new")
    except TransferError as error:
        said = str(error)
    taken = time.monotonic() - started
    if act == "kill -9" and victim != "worker":
        return said, taken
    trainer.options = usual
    # A user's loop goes on as soon as it can; whoever was away comes late to it.
    if spare is not None and rank == 0:
        trainer.engines.remove("engine0")
        trainer.engines.add(spare, "spare")
    held |= sample_dtensors(Layout.from_json(layout(world, 0)), rank, NEXT)
    end = time.monotonic() + LIMIT
    while True:
        try:
            trainer.send("next")
            break
        except TransferError:
            if time.monotonic() > end:
                raise
    trainer.verify()
    trainer.close()
    return said, taken


CASES = [
    *(("rank 0", act, step) for act in ("kill -9",) for step in ("handshake", "prepare", "send", "vote", "commit")),
    *(("rank 1", act, step) for act in ("kill -9",) for step in ("handshake", "prepare", "send", "vote")),
    *(("rank 0", "SIGSTOP", step) for step in ("send", "vote", "commit")),
    *(("rank 1", "SIGSTOP", step) for step in ("handshake", "send", "vote")),
    *(("worker", "kill -9", step) for step in ("handshake", "prepare", "send", "commit")),
    *(("worker", "SIGSTOP", step) for step in ("handshake", "prepare", "send", "commit")),
    *(("rank 0", act, step) for act in ("cut", "garbage") for step in ("prepare", "send", "vote", "commit")),
    *(("rank 1", act, step) for act in ("cut", "garbage") for step in ("prepare", "send", "vote")),
    *(("worker", act, step) for act in ("cut", "garbage") for step in ("prepare", "send", "commit")),
    ("rank 1", "slow", "send"),
    ("worker", "slow", "send"),
    ("rank 0", "slow", "commit"),
]  # fmt: skip


OVER = [
    (*case, over)
    for case in CASES
    for over in (("tcp", "memory") if case[2] == "send" and case[1] != "SIGSTOP" else ("tcp",))
]


@pytest.mark.parametrize(("victim", "act", "step", "over"), OVER)
def test_a_fault_leaves_one_version_and_the_next_update_works(
    request, trainers, processes, workers, victim, act, step, over
):
    client = Client(workers.addresses)
    if act == "kill -9" and victim != "worker":
        mortal: PlainRanks = request.getfixturevalue("mortal")
        with pytest.raises(RuntimeError, match="died"):
            mortal.run(update, client, victim, step, act, over, None)
        workers.call(idle)
        outcome = served(workers)
        takes_the_next_good_update(trainers, workers)
    elif act == "kill -9":
        rows = [(layout(2, 1), rank, rank, OLD) for rank in range(2)]
        with plain_workers(sample_target, rows) as (doomed, _):
            answers = trainers.run(update, Client(doomed.addresses), victim, step, act, over, workers)
            outcome = served(PlainClient(doomed.addresses[:1]))
        assert all(said for said, _ in answers)
    else:
        answers = trainers.run(update, client, victim, step, act, over, None)
        assert max(taken for _, taken in answers) < WORKER_STOPPED + SLACK
        if act == "slow":
            assert [said for said, _ in answers] == ["", ""]
            outcome = "new weights"
        else:
            outcome = "old weights" if all(said for said, _ in answers) else "new weights"
        assert served(workers) == "next weights"
    assert outcome in ("old weights", "new weights")
    late = (
        victim == "rank 0" and act == "SIGSTOP" and step in ("vote", "commit")
    )  # it decides when it goes on
    if not (victim == "worker" and step == "commit") and act != "slow" and not late:
        # Inside the vote of a commit a worker may be seen to say yes before it is gone, and then all have said it.
        assert outcome == "old weights" or act in ("cut", "garbage")
    if path := os.environ.get("TITAN_FAULTS"):
        with open(path, "a") as table:
            table.write(f"| {victim} | {act} | {step} | {over} | {outcome} |\n")


def idle(worker: Worker) -> None:
    """Answered once the worker is out of whatever it was called for."""


def served(workers: PlainClient) -> str:
    for version, name in ((OLD, "old"), (NEW, "new"), (NEXT, "next")):
        if not any(workers.call(differences, version)):
            return f"{name} weights"
    return "a mixture"
