"""The engines that a trainer updates, and the calls to them; used on trainer rank 0 alone."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.plan import Plan
from titan_bridge.transfer.clients import client_of
from titan_bridge.transfer.errors import PeerLost, TransferError
from titan_bridge.transfer.layouts import Sides
from titan_bridge.transfer.options import Client
from titan_bridge.transfer.protocol import MARGIN, Terms, Update
from titan_bridge.transfer.wire import Connection, Deadline


@dataclass(eq=False)
class Engine:
    """One engine: its client, and, once connected, its workers."""

    name: str
    client: Client
    link: str = ""
    """Of the connection that is up; else empty."""
    workers: list[Connection] = field(default_factory=list)
    """Control connections, by number of the worker."""
    sides: Sides | None = None
    plan: Plan | None = None
    version: str = ""
    """Of the weights that it serves, as it said last."""

    def call(self, what: Sequence[Callable[[], Any]], limit: Deadline) -> None:
        """Call the engine, one call after the other; after the time no further one begins.

        Raises:
            PeerLost: No answer within the time.
            TransferError: What the engine said.
        """
        error: list[Exception] = []

        def run() -> None:
            try:
                for each in what:
                    if limit.over:
                        return
                    each()
            except Exception as raised:
                error.append(raised)

        thread = threading.Thread(target=run, name="titan-call", daemon=True)
        thread.start()
        thread.join(limit.left + MARGIN)
        if thread.is_alive():
            raise PeerLost(f"{self.name} did not answer within the time limit")
        if error:
            lost = isinstance(error[0], OSError | PeerLost)  # of a client: nobody is there any more
            raise (PeerLost if lost else TransferError)(
                f"{self.name} {'is gone' if lost else 'refused'}: {error[0]}"
            )

    def invite(self, terms: Mapping[str, Any], limit: Deadline) -> None:
        """Ask its workers to connect; when this returns, they have. Raises as `call`."""
        self.close()
        link = secrets.token_hex(8)
        info = asdict(Terms(link=link, **terms))
        self.call([lambda: self.client.init_weight_transfer_engine(info)], limit)
        self.link = link

    def commit(self, update: Update, limit: Deadline) -> None:
        """Let the engine take an update that all its workers have. Raises as `call`."""
        info = asdict(update)
        calls = [
            self.client.start_weight_update,
            lambda: self.client.update_weights(info),
            self.client.finish_weight_update,
        ]
        try:
            self.call(calls, limit)
        except PeerLost:
            raise
        except TransferError:
            self.end_session(Deadline(MARGIN))
            raise

    def end_session(self, limit: Deadline) -> None:
        """Close a session that was started and not finished; the first call fails where an update is dropped."""
        for _ in range(2):
            with contextlib.suppress(TransferError):
                self.call([self.client.finish_weight_update], limit)
                return

    def ask(
        self, message: Mapping[str, Any] | Sequence[Mapping[str, Any]], limit: Deadline
    ) -> list[dict[str, Any]]:
        """Ask all workers, each the same or each its own; their answers, by number. Raises as `answers`."""
        self.request(message, limit)
        return self.answers(limit)

    def request(self, message: Mapping[str, Any] | Sequence[Mapping[str, Any]], limit: Deadline) -> None:
        each = [message] * len(self.workers) if isinstance(message, Mapping) else message
        for worker, own in zip(self.workers, each, strict=True):
            worker.send(own, limit)

    def answers(self, limit: Deadline) -> list[dict[str, Any]]:
        """Raises TransferError with what a worker refused, PeerLost where one is gone or silent."""
        found = [worker.receive(Deadline(limit.left + MARGIN)) for worker in self.workers]
        if refused := next((answer["error"] for answer in found if answer.get("error")), None):
            raise TransferError(refused)
        return found

    def close(self) -> None:
        """Cut the connections; the engine serves what it serves."""
        for worker in self.workers:
            worker.close()
        self.workers, self.link = [], ""


class Engines:
    """The engines of a trainer, which may change between updates; reached from rank 0 alone."""

    def __init__(self, engines: Sequence[Any] = ()) -> None:
        self._engines: list[Engine] = []
        for engine in engines:
            self.add(engine)

    def add(self, engine: Any, name: str | None = None) -> str:
        """An engine, from the next update on, which brings it all weights; returns its name.

        Args:
            engine: A URL, an `LLM` in this process, a client, or a Ray actor (see `clients.client_of`).
            name: For reports and errors; else the URL, or "engine0", "engine1", ...

        Raises:
            BridgeError: Not an engine, or a name that is taken.
        """
        client = client_of(engine)
        name = name or (repr(client) if isinstance(engine, str) else f"engine{len(self._engines)}")
        if name in self:
            raise BridgeError(f"engine {name!r} is there already")
        self._engines.append(Engine(name=name, client=client))
        return name

    def remove(self, name: str) -> None:
        """Leave an engine out; it goes on with what it has. Raises BridgeError where there is none of this name."""
        found = next((engine for engine in self._engines if engine.name == name), None)
        if found is None:
            raise BridgeError(f"no engine {name!r}; there are {', '.join(self) or 'none'}")
        self._engines.remove(found)
        found.close()

    def all(self) -> list[Engine]:
        return list(self._engines)

    def __iter__(self) -> Iterator[str]:
        return iter(engine.name for engine in self._engines)

    def __len__(self) -> int:
        return len(self._engines)
