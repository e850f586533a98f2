"""What a worker refuses, all refuse: they keep the old weights, bit for bit, and take the next good update."""

from __future__ import annotations

import dataclasses
import re
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.transfer_parties import (
    LIMIT,
    NEW,
    NEXT,
    OLD,
    have,
    layout,
    make,
    takes_the_next_good_update,
)
from titan_bridge.sharding.layout import Layout
from titan_bridge.testing_processes import PlainClient
from titan_bridge.testing_samples import differences, sample_dtensors, sample_locals, sample_target
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.target import Target
from titan_bridge.transfer.trainer import Trainer
from titan_bridge.transfer.worker import Worker

pytestmark = pytest.mark.distributed


def change(worker: Worker, index: int, what: str) -> None:
    """A worker whose live tensor is not what it was."""
    if worker.target.index != index:
        return
    live = dict(worker.target.tensors())
    live["layer3"] = live["layer3"].double() if what == "dtype" else live["layer3"][:10].clone()
    worker.target = Target(**{**vars(worker.target), "tensors": lambda: live})


def restore(worker: Worker) -> None:
    target = worker.target
    made = sample_target(target.layout.to_json(), target.rank, target.index, OLD)
    worker.target = dataclasses.replace(made, agree=target.agree)


def one_worker_refuses(rank: int, world: int, client: PlainClient, what: str, index: int) -> list[str]:
    trainer, held = make(rank, world, client, NEW)
    if rank == 0:
        client.call(change, index, what)
    reasons = []
    for _ in range(2):  # and again, over a new connection
        with pytest.raises(TransferError) as error:
            trainer.send()
        reasons.append(str(error.value))
    if rank == 0:
        client.call(restore)
        assert client.call(differences, OLD) == [[], []]
    held |= sample_dtensors(Layout.from_json(layout(world, 0)), rank, NEXT)
    trainer.send()
    trainer.close()
    return reasons


@pytest.mark.parametrize(("what", "index"), [("dtype", 0), ("shape", 1)])
def test_one_worker_refuses_and_so_do_all(trainers, workers, what, index):
    for reasons in trainers.run(one_worker_refuses, workers, what, index):
        assert all("layer3" in reason for reason in reasons)
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
        if self.order == "another version":
            update_info = {**update_info, "version": "forged"}
        if self.order == "another update":
            self.call(forget)
        super().update_weights(update_info)


def forget(worker: Worker) -> None:
    """One worker has nothing of the update, and its no is everybody's."""
    if worker.target.index == 1:
        worker._link.staged = None


def wrong_order(rank: int, world: int, client: Disorder, order: str) -> str:
    trainer, held = make(rank, world, client, NEW)
    client.order = order
    with pytest.raises(TransferError) as error:
        trainer.send()
    if rank == 0:
        assert client.call(differences, OLD) == [[], []]
    client.order = ""
    held |= sample_dtensors(Layout.from_json(layout(world, 0)), rank, NEXT)
    trainer.send()
    trainer.close()
    return str(error.value)


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("no start", "was not taken"),
        ("finish first", "was not taken"),
        ("not connected", "not initialized"),
        ("another version", "token is wrong"),
        ("another update", "was not taken"),
    ],
)
def test_a_commit_that_is_not_the_trainers_is_not_taken(trainers, workers, order, reason):
    for said in trainers.run(wrong_order, Disorder(workers.addresses), order):
        assert reason in said
    assert have(workers, NEXT)


TERMS = {"trainers": ["127.0.0.1:1"], "secret": "0" * 64, "run": "r", "link": "l", "seconds": 0.5}
UPDATE = {"link": "l", "number": 1, "version": "1", "token": "0" * 64}
WITHOUT = object()


@pytest.mark.parametrize(
    ("call", "key", "value", "reason"),
    [
        ("init", "secret", WITHOUT, "init_info lacks the key secret"),
        ("init", "hosts", "x", "init_info has an unknown key hosts; allowed: trainers, secret"),
        ("init", "secret", "open sesame", "init_info.secret is something else; String should match"),
        (
            "init",
            "trainers",
            [["127.0.0.1", 1]],
            "init_info.trainers is ['127.0.0.1', 1]; it must be a valid string",
        ),
        ("init", "trainers", [], "init_info.trainers is []; List should have at least 1 item"),
        ("init", "bucket_bytes", True, "init_info.bucket_bytes is True; it must be a valid integer"),
        ("init", "seconds", float("inf"), "init_info.seconds is inf; it must be a finite number"),
        ("init", "version", 1, "the trainer's protocol is 1, the engine's is 4"),
        ("init", "link", "l", "a worker on another host needs the address that Options(host=...) gives"),
        ("update", "link", WITHOUT, "update_info lacks the key link"),
        ("update", "version", 3, "update_info.version is 3; it must be a valid string"),
        (
            "update",
            "pause",
            "never",
            "update_info.pause is 'never'; it must be 'abort', 'wait', 'keep' or 'keep_cache'",
        ),
        ("update", "number", 0, "update_info.number is 0; it must be greater than or equal to 1"),
        ("update", "link", "l", "weight transfer not initialized: worker 0 is not connected"),
    ],
)
def test_a_call_with_a_bad_payload_raises(workers, call, key, value, reason):
    """As vLLM's own backends do: an answer of 200 would be taken for an update."""
    payload = {**(TERMS if call == "init" else UPDATE), key: value}
    payload = {name: given for name, given in payload.items() if given is not WITHOUT}
    workers.start_weight_update()
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        workers.init_weight_transfer_engine(payload) if call == "init" else workers.update_weights(payload)
    workers.finish_weight_update()
    assert have(workers, OLD)


class Unreadable(PlainClient):
    """One worker cannot even read what is live when it is about to vote."""

    def update_weights(self, update_info: dict) -> None:
        super().update_weights(update_info)
        self.call(hide)


def hide(worker: Worker) -> None:
    if worker.target.index == 1:
        worker.target = dataclasses.replace(worker.target, tensors=lambda: 1 // 0)


def unreadable(rank: int, world: int, client: Unreadable) -> tuple[str, float]:
    trainer, _ = make(rank, world, client, NEW)
    started = time.monotonic()
    with pytest.raises(TransferError) as error:
        trainer.send()
    trainer.close()
    return str(error.value), time.monotonic() - started


def test_whatever_goes_wrong_before_the_vote_is_a_no_that_all_hear(trainers, workers):
    for said, seconds in trainers.run(unreadable, Unreadable(workers.addresses)):
        assert "engine0 refused: the update was not taken" in said
        assert seconds < LIMIT / 2  # nobody waits in the vote
    workers.call(restore)
    assert have(workers, OLD)
    takes_the_next_good_update(trainers, workers)


def no_views() -> tuple:
    raise LookupError("no views here")


def without_views(worker: Worker) -> None:
    worker.target = dataclasses.replace(worker.target, views=no_views)


def test_what_a_worker_says_instead_of_its_views_is_the_error(workers):
    workers.call(without_views)
    with (
        Trainer({"layer": torch.ones(3)}, workers, options=Options(seconds=LIMIT)) as trainer,
        pytest.raises(TransferError, match=r"^LookupError: no views here$"),
    ):
        trainer.send()
    assert have(workers, OLD)


def cannot_listen(rank: int, world: int, client: PlainClient, at: int, bad: dict) -> str:
    with pytest.raises(TransferError) as error:
        Trainer({}, client, options=Options(**({"host": "127.0.0.1"} | (bad if rank == at else {}))))
    return str(error.value)


@pytest.mark.parametrize(
    ("at", "bad", "reason"),
    [(0, {"host": "192.0.2.1"}, "192.0.2.1:0 (.*assign.*)"), (1, {"port": 70_000}, "127.0.0.1:70001 (.*0-65535.*)")],
)  # fmt: skip
def test_where_one_rank_cannot_listen_all_hear_of_it(trainers, workers, at, bad, reason):
    for said in trainers.run(cannot_listen, workers, at, bad):
        assert re.match(f"trainer rank {at}: cannot listen at {reason}", said)


class Undecided(PlainClient):
    """Finishes before the trainer decided, as a client does that then sets a version."""

    def update_weights(self, update_info: dict) -> None:
        super().finish_weight_update("2")
        super().start_weight_update()
        self.call(forget_decision)
        super().finish_weight_update("2")


def forget_decision(worker: Worker) -> None:
    assert worker._link.staged is not None


def not_taken(rank: int, world: int, client: Undecided) -> str:
    trainer, _ = make(rank, world, client, NEW)
    with pytest.raises(TransferError) as error:
        trainer.send()
    trainer.close()
    return str(error.value)


def test_an_update_that_nobody_decided_is_not_taken(trainers, workers):
    for reason in trainers.run(not_taken, Undecided(workers.addresses)):
        assert "did not take the update" in reason
    assert have(workers, OLD)
    takes_the_next_good_update(trainers, workers)


def lone_trainer(client: PlainClient, version: int) -> tuple[Trainer, dict]:
    held = sample_locals(Layout.from_json(layout(1, 0)), 0, version)
    trainer = Trainer(lambda: held, client, rank=0, world=1, options=Options(seconds=LIMIT))
    trainer.connect()
    return trainer, held


def two_trainers(rank: int, world: int, client: PlainClient) -> str | None:
    """Two processes, each a trainer of one rank."""
    refused = None
    if rank == 0:
        trainer, _ = lone_trainer(client, NEW)
    dist.barrier()
    if rank == 1:
        second = Trainer({}, client, rank=0, world=1, options=Options(seconds=LIMIT))
        with pytest.raises(TransferError) as error:
            second.connect()
        second.close()  # takes nothing from the first one
        refused = str(error.value)
    dist.barrier()
    if rank == 0:
        trainer.send()
        assert client.call(differences, NEW) == [[], []]
        trainer.close()
    dist.barrier()
    if rank == 1:  # the first one has left
        trainer, _ = lone_trainer(client, NEXT)
        trainer.send()
    dist.barrier()
    return refused


def test_a_second_trainer_is_refused_while_the_first_one_lives(trainers, workers):
    _, refused = trainers.run(two_trainers, workers)
    assert "connected with another trainer" in refused
    assert have(workers, NEXT)


def without_memory(worker: Worker, index: int) -> None:
    """A worker that asks for more memory than there is."""
    if worker.target.index == index:
        worker.target = Target(
            **{**vars(worker.target), "memory": lambda like, device: torch.empty(1 << 60, device=device)}
        )


def no_memory(rank: int, world: int, client: PlainClient) -> str:
    if rank == 0:
        client.call(without_memory, 1)
    dist.barrier()
    trainer, _ = make(rank, world, client, NEW)
    with pytest.raises(TransferError) as error:
        trainer.send()
    trainer.close()
    return str(error.value)


def test_a_worker_without_memory_for_the_new_weights_says_so(trainers, workers):
    for reason in trainers.run(no_memory, workers):
        assert "no memory on the host for 37.06 kB of new weights" in reason
    assert have(workers, OLD)
    workers.call(restore)
    takes_the_next_good_update(trainers, workers)
