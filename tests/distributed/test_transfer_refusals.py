"""What a worker refuses, all refuse: they keep the old weights, bit for bit, and take the next good update."""

from __future__ import annotations

import re

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
from titan_bridge.ports import free_port
from titan_bridge.sharding.layout import Layout
from titan_bridge.transfer.board import Board
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.plain import PlainClient
from titan_bridge.transfer.receiver import Receiver
from titan_bridge.transfer.samples import differences, sample_dtensors, sample_locals, sample_target
from titan_bridge.transfer.source import TensorSource
from titan_bridge.transfer.target import Target
from titan_bridge.transfer.trainer import Trainer

pytestmark = pytest.mark.distributed


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


TERMS = {"host": "127.0.0.1", "port": 1, "trainer": "t", "epoch": 1, "trainers": 1, "seconds": 0.5}
UPDATE = {"host": "127.0.0.1", "port": 1, "trainer": "t", "epoch": 1, "round": 1, "first": 1}
UPDATE |= {"version": "1", "base": None, "kind": "dense"}
WITHOUT = object()


@pytest.mark.parametrize(
    ("call", "key", "value", "reason"),
    [
        ("init", "host", WITHOUT, "init_info lacks the key host"),
        ("init", "hosts", "x", "init_info has an unknown key hosts; allowed: host, port"),
        ("init", "port", "29600", "init_info.port is '29600'; it must be a valid integer"),
        ("init", "port", 70000, "init_info.port is 70000; it must be less than or equal to 65535"),
        ("init", "trainers", True, "init_info.trainers is True; it must be a valid integer"),
        ("init", "seconds", float("inf"), "init_info.seconds is inf; it must be a finite number"),
        ("init", "backend", "mpi", "init_info.backend is 'mpi'; it must be 'gloo' or 'nccl'"),
        ("init", "epoch", 1, "no trainer at 127.0.0.1:1"),
        ("update", "trainer", WITHOUT, "update_info lacks the key trainer"),
        ("update", "base", 3, "update_info.base is 3; it must be a valid string"),
        ("update", "kind", "whole", "update_info.kind is 'whole'; it must be 'dense' or 'sparse'"),
        ("update", "port", 0, "update_info.port is 0; it must be greater than or equal to 1"),
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


def test_an_update_before_init_raises(workers):
    board = Board.open("127.0.0.1", 0, seconds=5)
    workers.start_weight_update()
    with pytest.raises(RuntimeError, match="weight transfer not initialized: worker 0 is not connected"):
        workers.update_weights({**UPDATE, "port": board.port})
    assert "not initialized" in board.read("t/1/round1/ready/1", seconds=1)
    assert have(workers, OLD)


class Undecided(PlainClient):
    """Finishes an update before the trainer decided, as a client does that then sets a version."""

    heard = ""

    def update_weights(self, update_info: dict) -> None:
        super().update_weights(update_info)
        try:
            super().finish_weight_update("2")
        except RuntimeError as error:
            self.heard = str(error)
            raise


def not_taken(rank: int, world: int, port: int, client: Undecided) -> str:
    trainer, _ = make(rank, world, port, client, NEW)
    with pytest.raises(TransferError) as error:
        trainer.send_weights()
    trainer.shutdown()
    return f"{client.heard} ({error.value})"


def test_finish_raises_when_the_update_was_not_taken(trainers, workers):
    heard, _ = trainers.run(not_taken, free_port(), Undecided(workers.addresses))
    assert "the update was not taken" in heard
    assert have(workers, OLD)
    takes_the_next_good_update(trainers, workers)


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


def without_memory(receiver: Receiver, index: int) -> None:
    """A worker that asks for more memory than there is."""
    if receiver.target.index == index:
        receiver.target = Target(
            **{**vars(receiver.target), "memory": lambda like, device: torch.empty(1 << 60, device=device)}
        )


def no_memory(rank: int, world: int, port: int, client: PlainClient) -> str:
    if rank == 0:
        client.call(without_memory, 1)
    dist.barrier()
    trainer, _ = make(rank, world, port, client, NEW)
    with pytest.raises(TransferError) as error:
        trainer.send_weights()
    trainer.shutdown()
    return str(error.value)


def test_a_worker_without_memory_for_the_new_weights_says_so(trainers, workers):
    for reason in trainers.run(no_memory, free_port(), workers):
        assert "no memory on the host for 37.06 kB of new weights" in reason
    assert have(workers, OLD)
    workers.call(restore)
    takes_the_next_good_update(trainers, workers)
