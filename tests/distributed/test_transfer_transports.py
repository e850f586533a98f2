"""Every transport brings whole updates and deltas, and ends with its connection when somebody dies or stops."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.transfer_parties import NEW, OLD, have, layout, make, takes_the_next_good_update
from titan_bridge.sharding.layout import Layout
from titan_bridge.testing_processes import PlainClient, plain_ranks, plain_workers
from titan_bridge.testing_samples import differences, same_bits, sample_locals, sample_target
from titan_bridge.transfer import transports
from titan_bridge.transfer.errors import PeerLost, TransferError
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.target import Target
from titan_bridge.transfer.trainer import Trainer
from titan_bridge.transfer.transports import Memory, Tcp, accept, offer
from titan_bridge.transfer.wire import Connection, Deadline, Listener, connect
from titan_bridge.transfer.worker import Worker

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")


def used(trainer: Trainer) -> set[str]:
    return {way.transport.name for way in trainer._ways.values() if way.transport}


def used_by(worker: Worker) -> set[str]:
    return {way.name for way in worker._link.transports.values()} if worker._link else set()


def updates(rank: int, world: int, client: PlainClient, transport: str) -> tuple[set[str], str, str, int]:
    trainer, held = make(rank, world, client, NEW, transport=transport)
    with trainer:
        kinds = [trainer.send().kind]
        held["norm"].to_local().add_(1)
        kinds.append(trainer.send().kind)
        if rank == 0:
            assert client.call(used_by) == [used(trainer)] * 2
        return used(trainer), *kinds, trainer.verify()


@pytest.mark.parametrize(
    ("asked", "taken"), [("auto", "memory"), ("memory", "memory"), ("tcp", "tcp"), ("gloo", "gloo")]
)
def test_each_brings_whole_updates_and_deltas(trainers, workers, asked, taken):
    for answer in trainers.run(updates, workers, asked):
        assert answer == ({taken}, "whole", "delta", 14)


def refused(rank: int, world: int, client: PlainClient) -> str:
    trainer, _ = make(rank, world, client, NEW, transport="nccl")
    with trainer, pytest.raises(TransferError) as error:
        trainer.send()
    return str(error.value)


def test_one_that_the_two_cannot_have_is_refused_by_name(trainers, workers):
    for text in trainers.run(refused, workers):
        assert "nccl: the trainer's tensors are on cpu, the engine's on cpu; Options.transport" in text
    assert have(workers, OLD)


def fault(rank: int, world: int, client: PlainClient, transport: str, act: int) -> None:
    trainer, held = make(rank, world, client, OLD, transport=transport)
    trainer.send()  # makes the connections: takes long on a busy machine, so not within the limit that is waited out
    for tensor in held.values():
        tensor.to_local().add_(1)
    trainer.options = dataclasses.replace(trainer.options, seconds=3)
    if rank == 1:
        trainer.source.act = lambda: os.kill(os.getpid(), act)  # type: ignore[attr-defined]
    with pytest.raises(TransferError):
        trainer.send()


@pytest.mark.parametrize("act", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("transport", ["memory", "gloo"])
def test_a_rank_that_dies_or_stops_leaves_the_old_weights(mortal, trainers, workers, transport, act):
    with pytest.raises(RuntimeError, match="rank 1: died"):
        answers = mortal.start(fault, workers, transport, int(act))
        if act == signal.SIGSTOP:
            mortal._pipes[0].poll(60)  # rank 0 has given up
            mortal.processes[1].kill()
        answers()
    assert have(workers, OLD)
    takes_the_next_good_update(trainers, workers)


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    listener = Listener("127.0.0.1", 0, b"s" * 32)
    here = connect("127.0.0.1", listener.port, b"s" * 32, {}, Deadline(60))
    (there,) = listener.take(1, Deadline(60))
    yield there, here
    for each in (here, there, listener):
        each.close()


@pytest.mark.parametrize(
    ("handle", "reason"),
    [
        ({"path": "/proc/0/fd/3", "key": "00" * 32}, "No such file"),
        ({"path": __file__, "key": "00" * 32}, "not on one host"),
        (None, "not on one host"),
    ],
    ids=["no such process", "another file", "another ring"],
)
def test_without_shared_memory_the_connection_is_taken_and_the_log_says_why(ends, handle, reason, caplog):
    trainer, worker = ends
    with transports._shared(CPU) as (_, ring):
        trainer.send(
            {"offer": ["memory", "tcp"], "device": "cpu", "memory": handle or {**ring, "key": "00" * 32}},
            Deadline(60),
        )
        caplog.set_level("INFO", "vllm.titan_bridge.transfer.transports")
        assert type(accept(worker, CPU, Deadline(60))) is Tcp
    assert trainer.receive(Deadline(60)) == {"take": "tcp"}
    assert re.search(f"come over tcp \\(memory: .*{reason}", caplog.text)


@pytest.fixture
def no_more_files() -> Iterator[None]:
    """As with a limit that is reached: nothing can be opened, and so no memory shared."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.dup(0))  # the limit is on numbers, and there may be gaps among those in use
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("transport", ["auto", "memory"])
def test_a_trainer_that_can_share_no_memory_offers_what_is_left(ends, no_more_files, transport):
    taken: list[Tcp | Exception] = []

    def take() -> None:
        try:
            taken.append(accept(ends[1], CPU, Deadline(60)))
        except TransferError as error:
            taken.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        sender: Tcp | Exception = offer(ends[0], transport, CPU, Deadline(60))
    except TransferError as error:
        sender = error
    thread.join()
    if transport == "auto":
        assert [type(sender), type(taken[0])] == [Tcp, Tcp]
        return
    for said in (sender, taken[0]):
        assert re.match(r"no transport to .*: memory: .*Too many open files.*may be 'auto'", str(said))


def test_a_group_that_cannot_be_made_names_the_transport_that_needs_none(ends):
    """The other end leaves in the middle of it."""

    def leave() -> None:
        ends[1].receive(Deadline(60))
        ends[1].send({"take": "gloo"}, Deadline(60))
        ends[1].close()

    thread = threading.Thread(target=leave)
    thread.start()
    with pytest.raises(PeerLost, match=r'^no gloo group with .*Options\(transport="tcp"\) needs none$'):
        offer(ends[0], "gloo", CPU, Deadline(20))
    thread.join()


def test_a_gpu_is_opened_by_the_number_that_this_process_gives_it():
    assert transports._number(torch.device("cuda", 3)) == 3


def test_a_ring_carries_any_sizes_and_keeps_no_file_open(ends):
    taken: list[Tcp] = []
    thread = threading.Thread(target=lambda: taken.append(accept(ends[1], CPU, Deadline(60))))
    thread.start()
    sender = offer(ends[0], "memory", CPU, Deadline(60))
    thread.join()
    assert isinstance(sender, Memory)
    files = [os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]
    assert not [file for file in files if "memfd:titan-transfer" in file]
    sizes = [1, 3, transports.SLOT_BYTES, 9 * transports.SLOT_BYTES + 5, 0]
    data = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in sizes]
    came = [torch.empty_like(each) for each in data]

    def send() -> None:
        for each in data:
            sender.send(each, Deadline(60))
        sender.finish(Deadline(60))

    thread = threading.Thread(target=send)
    thread.start()
    for each in came:
        taken[0].receive(each, Deadline(60))
    thread.join()
    assert all(same_bits(a, b) for a, b in zip(data, came, strict=True))
    for end in (sender, taken[0]):
        end.close()
    assert "memfd:titan-transfer" not in Path("/proc/self/maps").read_text()


def test_who_makes_a_group_keeps_nobody_from_making_one(ends):
    """Both ends in one process: else two trainer ranks and two workers can wait for each other crosswise."""
    taken: list[Tcp] = []
    thread = threading.Thread(target=lambda: taken.append(accept(ends[1], CPU, Deadline(60))))
    thread.start()
    sender = offer(ends[0], "gloo", CPU, Deadline(60))
    thread.join()
    assert [each.name for each in (sender, *taken)] == ["gloo", "gloo"]
    for end in (sender, *taken):
        end.close()


def on_gpu(told: dict[str, Any], at: int) -> Target:
    made = sample_target(told, 0, 0, OLD)
    live = {name: tensor.cuda(at) for name, tensor in made.tensors().items()}
    return Target(tensors=lambda: live, layout=made.layout, rank=0, index=0)


def off(worker: Worker) -> list[str]:
    """Names of what differs from NEW, on a GPU."""
    live = {name: tensor.cpu() for name, tensor in worker.target.tensors().items()}
    worker.target = Target(tensors=lambda: live, layout=worker.target.layout, rank=0, index=0)
    return differences(worker, NEW)


def from_gpu(rank: int, world: int, client: PlainClient) -> tuple[set[str], str, str, int]:
    now = {name: t.cuda(0) for name, t in sample_locals(Layout.from_json(layout(1, 0)), 0, OLD).items()}
    with Trainer(lambda: now, client, options=Options(seconds=60)) as trainer:
        first = trainer.send().kind
        now["norm"] += 1
        second = trainer.send().kind
        trainer.verify()
        for name, tensor in sample_locals(Layout.from_json(layout(1, 0)), 0, NEW).items():
            now[name].copy_(tensor)
        trainer.send()
        return used(trainer), first, second, trainer.verify()


@pytest.mark.gpu
@pytest.mark.parametrize(("at", "taken"), [(0, "memory"), (1, "nccl")])
def test_from_gpu_to_gpu(at, taken):
    if torch.cuda.device_count() <= at:
        pytest.skip(f"fewer than {at + 1} CUDA devices")
    with plain_workers(on_gpu, [(layout(1, 0), at)]) as (client, _), plain_ranks(1) as ranks:
        assert ranks.run(from_gpu, client) == [({taken}, "whole", "delta", 7)]
        assert client.call(off) == [[]]
