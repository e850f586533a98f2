"""Workers that serve nothing, and trainer ranks that train nothing: processes with tensors, for a transfer.

For tests and benchmarks, and to try a layout before there is an engine: they need no vLLM and start in seconds.
`PlainClient` drives all workers as vLLM's executor does: one call at a time, answered by all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from titan_bridge.ports import free_port
from titan_bridge.transfer.protocol import Terms, Update, parsed
from titan_bridge.transfer.target import Target
from titan_bridge.transfer.wire import at_once
from titan_bridge.transfer.worker import Worker

_METHODS: dict[str, Callable[..., None]] = {
    "init_weight_transfer_engine": lambda worker, info: worker.connect(parsed(Terms, "init_info", info)),
    "shutdown_weight_transfer_engine": Worker.shutdown,
    "start_weight_update": Worker.begin,
    "update_weights": lambda worker, info: worker.decide(parsed(Update, "update_info", info)),
    "finish_weight_update": Worker.finish,
}


_users = 0
_started = False


@contextmanager
def forked(*imported: str) -> Iterator[Any]:
    """Processes forked from one that has torch and the modules `imported`, and no threads: a new one starts at once.

    Ends that process with its last user, since it would outlive them until the interpreter ends. One that was there
    before (an engine's, in this process) is used as it is, and left to whoever started it.
    """
    global _users, _started
    context = mp.get_context("forkserver")
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if not _users and server._forkserver_pid is None:
        # The second one is what the first DTensor of a process imports, for seconds.
        context.set_forkserver_preload(["titan_bridge.testing_samples", "torch._dynamo", *imported])
        _started = True
    _users += 1
    try:
        yield context
    finally:
        _users -= 1
        if not _users and _started:
            _started = False
            if server._forkserver_pid is not None:  # nobody has asked for a process
                os.kill(
                    server._forkserver_pid, signal.SIGKILL
                )  # told to end, it takes seconds to forget its modules
            server._stop()


def retarget(worker: Worker, make: Callable[..., Target], rows: Sequence[tuple]) -> None:
    """For `PlainClient.call`: let a worker start anew, with what `make(*rows[its index])` makes."""
    restart(worker, make(*rows[worker.target.index]))


def restart(worker: Worker, target: Target) -> None:
    """Let a worker start anew, with another target; it votes with the workers that it voted with."""
    worker.shutdown()
    worker.__init__(dataclasses.replace(target, agree=worker.target.agree))  # type: ignore[misc]


def _vote(group: dist.ProcessGroupGloo, mine: Sequence[int]) -> list[int]:
    seen, options = torch.tensor(mine), dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MIN  # type: ignore[assignment]
    group.allreduce([seen], options).wait()  # type: ignore[attr-defined]
    return seen.tolist()


def _serve(
    make: Callable[..., Target], args: tuple, address: str, threads: int, rank: int, together: int
) -> None:
    torch.set_num_threads(threads)
    target = make(*args)
    if together > 1:
        store = dist.FileStore(f"{Path(address).parent}/vote", together)
        group = dist.ProcessGroupGloo(store, rank, together, timedelta(seconds=60))
        target = dataclasses.replace(target, agree=functools.partial(_vote, group))
    worker = Worker(target)
    listener = connection.Listener(address, family="AF_UNIX")
    Path(f"{address}.ready").touch()
    while True:
        with listener.accept() as caller:
            try:
                method, given = caller.recv()
                function = _METHODS[method] if isinstance(method, str) else method
                caller.send((True, function(worker, *given)))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                continue  # whoever called is gone
            except Exception as error:
                traceback.print_exc()
                with contextlib.suppress(OSError):
                    caller.send((False, str(error)))


class PlainClient:
    """Drives workers at these addresses; may be sent to another process."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = tuple(addresses)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("init_weight_transfer_engine", init_info)

    def shutdown_weight_transfer_engine(self) -> None:
        self.call("shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self.call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call("finish_weight_update")

    def call(self, method: str | Callable[..., Any], *args: Any) -> list[Any]:
        """Run a method of all workers, or `method(worker, *args)`; their answers in order."""
        answers: list[Any] = [None] * len(self.addresses)

        def ask(at: int) -> None:
            try:
                with connection.Client(self.addresses[at], family="AF_UNIX") as worker:
                    worker.send((method, args))
                    answers[at] = worker.recv()
            except (OSError, EOFError) as error:
                answers[at] = (None, f"worker {at} is gone: {error!r}")

        at_once(ask, range(len(self.addresses)))
        for good, answer in answers:
            if not good:
                raise (ConnectionError if good is None else RuntimeError)(answer)
        return [answer for _, answer in answers]


@contextmanager
def plain_workers(
    make: Callable[..., Target], arguments: Sequence[tuple], *, threads: int = 1, apart: bool = False
) -> Iterator[tuple[PlainClient, list[mp.Process]]]:
    """Start one process for each of `arguments`, which holds what `make(*arguments)` makes; end them afterwards.

    They vote together, as the workers of one engine, unless they are `apart`.
    """
    with forked() as context, tempfile.TemporaryDirectory(prefix="titan-") as folder:
        addresses = [os.path.join(folder, str(i)) for i in range(len(arguments))]
        processes = [
            context.Process(
                target=_serve,
                args=(make, args, address, threads, rank, 1 if apart else len(arguments)),
                daemon=True,
            )
            for rank, (args, address) in enumerate(zip(arguments, addresses, strict=True))
        ]
        try:
            for process in processes:
                process.start()
            for process, address in zip(processes, addresses, strict=True):
                while not Path(f"{address}.ready").exists():
                    process.join(0.02)
                    if process.exitcode is not None:
                        raise RuntimeError(f"a worker ended with exit code {process.exitcode}")
            yield PlainClient(addresses), processes
        finally:
            for process in processes:
                process.kill()
                process.join()


@contextmanager
def door(target: Any, address: str) -> Iterator[PlainClient]:
    """Let other processes call the methods of `target` through the client, one at a time; for a client of an engine."""
    listener = connection.Listener(address, family="AF_UNIX")

    def serve() -> None:
        while True:
            try:
                with listener.accept() as caller:
                    method, args = caller.recv()
                    try:
                        answer = (True, getattr(target, method)(*args))
                    except Exception as error:
                        answer = (False, str(error))
                    caller.send(answer)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                continue  # whoever called is gone
            except OSError:
                return  # closed

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield PlainClient([address])
    finally:
        listener.close()


def _rank(pipe: connection.Connection, rank: int, threads: int) -> None:
    torch.set_num_threads(threads)
    while True:
        job, world, port, args = pipe.recv()
        try:
            limit = timedelta(seconds=60)
            dist.init_process_group(
                "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=limit
            )
            try:
                answer = (True, job(rank, world, *args))
            finally:
                dist.destroy_process_group()
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


class PlainRanks:
    """Processes that run jobs as ranks of a gloo process group, a new group for each job."""

    def __init__(self, context: Any, count: int, threads: int) -> None:
        self._pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(theirs, rank, threads), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def start(self, job: Callable[..., Any], *args: Any, world: int | None = None) -> Callable[[], list[Any]]:
        """Run `job(rank, world, *args)` on the first `world` processes; call the result for their answers.

        The answers raise RuntimeError with the traceback of the first rank that failed or died.
        """
        world = len(self.processes) if world is None else world
        port = free_port()
        for pipe in self._pipes[:world]:
            pipe.send((job, world, port, args))
        return lambda: self._answers(world)

    def run(self, job: Callable[..., Any], *args: Any, world: int | None = None) -> list[Any]:
        """`start`, and wait."""
        return self.start(job, *args, world=world)()

    def _answers(self, world: int) -> list[Any]:
        answers: list[tuple[bool, Any]] = []
        for rank in range(world):  # all of them, or the next job would find what is left
            try:
                answers.append(self._pipes[rank].recv())
            except (EOFError, ConnectionResetError):
                answers.append((False, "died"))
        for rank, (good, answer) in enumerate(answers):
            if not good:
                raise RuntimeError(f"rank {rank}: {answer}")
        return [answer for _, answer in answers]


@contextmanager
def plain_ranks(count: int, *, threads: int = 1) -> Iterator[PlainRanks]:
    """`count` processes for jobs; ended afterwards."""
    with forked() as context:
        ranks = PlainRanks(context, count, threads)
        try:
            yield ranks
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
