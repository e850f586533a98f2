"""The engines that a trainer updates, and the calls to them; used on trainer rank 0 alone."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.plan import Plan
from titan_bridge.transfer.clients import Client, client_of
from titan_bridge.transfer.errors import PeerLost, TransferError
from titan_bridge.transfer.layouts import Sides
from titan_bridge.transfer.protocol import MARGIN, Terms, Update
from titan_bridge.transfer.wire import Connection, Deadline


@dataclass(eq=False)
class Engine:
    """One engine: its client, and, once connected, its workers."""

    name: str
    client: Client
    link: str = ""  # of the connection that is up; else empty
    workers: list[Connection] = field(default_factory=list)  # control connections, by number of the worker
    sides: Sides = field(init=False)
    plan: Plan = field(init=False)
    delta: bool = False
    """True if every worker still serves the weights that this trainer's last update left, so a delta can be sent."""
    version: str = ""  # of the weights that it serves, as it said last

    @property
    def keys(self) -> list[str]:  # of its workers, by number, as trainer ranks have them
        return [f"{self.link}/{at}" for at in range(len(self.workers))]

    def call(self, calls: Mapping[str, Callable[[], Any]], limit: Deadline) -> None:
        """Call the engine, one call after the other, by name; after the time no further one begins.

        Raises PeerLost where nobody is there or answers in time, TransferError with what the engine refused.
        """
        answer: Future[None] = Future()

        def run() -> None:
            try:
                for name, each in calls.items():
                    if limit.over:
                        raise PeerLost(f"no time left for {name}")
                    each()
                answer.set_result(None)
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=run, name="titan-call", daemon=True).start()
        try:
            answer.result(limit.left + MARGIN)
        except (OSError, PeerLost) as error:  # TimeoutError is one
            why = str(error) or "no answer within the time limit"
            raise PeerLost(f"{self.name} is gone: {why}") from None
        except Exception as error:
            raise TransferError(f"{self.name} refused: {error}") from None

    def invite(self, terms: Terms, limit: Deadline) -> None:
        """Ask its workers to connect; when this returns, they have. Raises as `call`."""
        self.close()
        init = functools.partial(self.client.init_weight_transfer_engine, asdict(terms))
        self.call({"init_weight_transfer_engine": init}, limit)
        self.link = terms.link

    def commit(self, update: Update, limit: Deadline) -> None:
        """Let the engine take an update that all its workers have. Raises as `call`."""
        calls = {
            "start_weight_update": self.client.start_weight_update,
            "update_weights": functools.partial(self.client.update_weights, asdict(update)),
            "finish_weight_update": self.client.finish_weight_update,
        }
        try:
            self.call(calls, limit)
        except TransferError as error:
            if not isinstance(error, PeerLost):
                self.end_session(Deadline(MARGIN))
            raise

    def end_session(self, limit: Deadline) -> None:
        """Close a session that was started and not finished; the first call fails where an update is dropped."""
        for _ in range(2):
            with contextlib.suppress(TransferError):
                self.call({"finish_weight_update": self.client.finish_weight_update}, limit)
                return

    def tell(self, message: Mapping[str, Any], limit: Deadline, **each: Sequence[Any]) -> None:
        """Tell all workers; `each`: what each is told of its own, by number."""
        for at, worker in enumerate(self.workers):
            worker.send({**message, **{key: own[at] for key, own in each.items()}}, limit)

    def ask(self, message: Mapping[str, Any], limit: Deadline, **each: Sequence[Any]) -> list[dict[str, Any]]:
        """`tell`, and hear their answers, by number. Raises as `answers`."""
        self.tell(message, limit, **each)
        return self.answers(limit)

    def answers(self, limit: Deadline, of: int | None = None) -> list[dict[str, Any]]:
        """Those of all workers, or of the first few.

        Raises TransferError with what a worker refused, PeerLost where one is gone or silent.
        """
        found = [worker.receive(Deadline(limit.left + MARGIN)) for worker in self.workers[:of]]
        if refused := next((answer["error"] for answer in found if answer.get("error")), None):
            raise TransferError(refused)
        return found

    def close(self) -> None:
        """Cut the connections; the engine serves what it serves."""
        for worker in self.workers:
            worker.close()
        self.workers, self.link = [], ""


class Engines(dict[str, Engine]):
    """The engines of a trainer by name, which may change between updates; used on rank 0 alone."""

    def add(self, engine: Any, name: str | None = None) -> str:
        """An engine, from the next update on, which brings it all weights; returns its name.

        `engine`: a URL, an `LLM` in this process, or a client (see `clients.client_of`), else BridgeError. `name`: for
        reports and errors; else the URL, or the first of "engine0", "engine1", ... that is free.
        """
        client = client_of(engine)
        free = next(at for at in itertools.count() if f"engine{at}" not in self)
        name = name or (repr(client) if isinstance(engine, str) else f"engine{free}")
        if name in self:
            raise BridgeError(f"engine {name!r} is there already")
        self[name] = Engine(name=name, client=client)
        return name

    def remove(self, name: str) -> None:
        """Leave an engine out; it goes on with what it has. Raises BridgeError where there is none of this name."""
        if name not in self:
            raise BridgeError(f"no engine {name!r}; there are {', '.join(self) or 'none'}")
        self.pop(name).close()
