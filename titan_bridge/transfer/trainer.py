"""The trainer's side of a transfer, without vLLM: every trainer rank makes one, rank 0 talks to the engine.

One update, as seen from rank 0: start_weight_update; update_weights, which keeps the workers busy receiving while
all trainer ranks send; when every worker has said that it has everything, the decision, finish_weight_update, and
the workers' word that it is live. Whatever goes wrong before the decision ends in no change and a TransferError on
every rank, and the next update makes a new connection by itself.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.plan import Plan
from titan_bridge.transfer.board import Board
from titan_bridge.transfer.dense import Deadline, DenseSender
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.exchange import Sides, join_sides, names_differ
from titan_bridge.transfer.lanes import BUCKET_BYTES
from titan_bridge.transfer.link import Link, Terms
from titan_bridge.transfer.packets import send_sparse
from titan_bridge.transfer.source import TensorSource
from titan_bridge.transfer.sparse import Outbox, Patch
from titan_bridge.transfer.transport import Backend

MARGIN = 2.0
"""Seconds that the trainer waits longer than those it waits for, so that it hears their reason."""
PauseMode = Literal["abort", "wait", "keep"]


class Client(Protocol):
    """vLLM's `VLLMWeightSyncClient`; any other method of an engine is used if the client has it: `engines`,
    `pause_generation(mode)`, `resume_generation()`, `reset_prefix_cache()`, `update_weight_version(version)`."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a trainer connects and sends."""

    host: str = "127.0.0.1"
    """Address of trainer rank 0 that the other trainer ranks and all workers reach."""
    port: int = 0
    """Of the board; 0 takes a free one, which only rank 0 then knows: for trainers of one rank."""
    seconds: float = 300.0
    """Time limit of a connection and of an update."""
    bucket_bytes: int = BUCKET_BYTES
    """Most bytes of one message; a sender holds two."""
    backend: Backend = "gloo"
    workers: int | None = None
    """Workers of each engine where these cannot know: dense models with vLLM's data parallelism."""
    pause: PauseMode | None = "keep"
    """vLLM's pause mode for requests in flight, if the client can pause; None: do not."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one update did, as this trainer rank saw it."""

    version: str
    kind: Literal["dense", "sparse"]
    seconds: float
    """From the call to the weights being live."""
    sent: Mapping[int, int]
    """Bytes that this rank sent, by worker (0, 1, ...)."""
    received: Mapping[int, int] = field(default_factory=dict)
    """Bytes that each worker received; on rank 0."""
    lower_bound: int = 0
    """Bytes that a dense update needs at least, over all workers."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds up to the end of each phase; on rank 0."""


class Trainer:
    """One trainer rank. All ranks call the same methods in the same order."""

    def __init__(
        self, source: TensorSource, client: Client, *, rank: int, world: int, options: Options | None = None
    ) -> None:
        """Opens (rank 0) or joins the board; `connect` meets the engine.

        Raises:
            BridgeError: Several ranks and no port.
            TransferError: No board of rank 0 within the time.
        """
        self.source, self.client, self.rank, self.world = source, client, rank, world
        self.options = options or Options()
        if not self.options.port and world > 1:
            raise BridgeError(
                f"{world} trainer ranks need a port that all of them know; give one (port=0 is for one)"
            )
        o = self.options
        make = Board.open if rank == 0 else Board.join
        self._board = make(o.host, o.port, seconds=o.seconds)
        if rank == 0:
            self._board.post("trainer", uuid.uuid4().hex)
        self._name: str = self._board.read("trainer", seconds=o.seconds)
        self._link: Link | None = None
        self._sender: DenseSender | None = None
        self._said: dict[str, tuple] = {}
        self._epoch = self._calls = self._rounds = 0
        self._version: str | None = None
        self._committed = 0
        self._session = False
        self._pending: _Call | None = None
        self._planned: tuple[Sides, Plan] | None = None

    @property
    def sides(self) -> Sides | None:
        """Both layouts, once connected."""
        return self._link.sides if self._link is not None else None

    @property
    def buffer_bytes(self) -> int:
        """Memory that this rank holds for sending: at most two buckets."""
        return self._sender.buffer_bytes if self._sender is not None else 0

    # Connecting

    def connect(self) -> None:
        """Exchange layouts and make the plan and the group.

        Raises:
            BridgeError: The two sides do not fit together.
            TransferError: The engine is busy with another trainer, or somebody did not come within the time.
        """
        self._collective(self._nothing)

    def _nothing(self, call: str) -> None:
        return None

    def _collective(self, action: Callable[[str], Any]) -> Any:
        """Run `action` on all ranks, with a connection; what one rank cannot do, none does."""
        self._calls += 1
        key = f"call{self._calls}"
        limit = Deadline(self.options.seconds)
        self._board.post(f"{key}/{self.rank}", self._link is not None)
        if self.rank == 0:
            connected = [self._board.read(f"{key}/{r}", seconds=limit.left) for r in range(self.world)]
            self._epoch += 0 if all(connected) else 1
            self._board.post(key, None if all(connected) else self._epoch)
        epoch = self._board.read(key, seconds=limit.left + MARGIN)
        try:
            if epoch is not None:
                self._drop()
                self._epoch = epoch
                self._connect()
            return action(key)
        except TransferError:
            self._drop()
            raise

    def _connect(self) -> None:
        limit = Deadline(self.options.seconds)
        terms = self._terms()
        own = f"{terms.prefix}/trainer/{self.rank}"
        try:
            self._said = self.source.signature()
            self._board.post(own, {"layout": self.source.layout().to_json()})
        except BridgeError as error:
            self._board.post(own, {"refused": f"trainer rank {self.rank}: {error}"})
        call: _Call | None = None
        open_session = False
        if self.rank == 0:
            call, open_session = self._invite(terms, limit)
        note = self._board.read(f"{terms.prefix}/sides", seconds=limit.left + MARGIN)
        if "refused" in note:
            raise (BridgeError if note.get("mistake") else TransferError)(note["refused"])
        sides = Sides.from_json(note)
        plan = self._plan(sides)
        self._link = Link(board=self._board, terms=terms, sides=sides, rank=self.rank, plan=plan)
        self._sender = DenseSender(self._link.transport, self._link.lanes)
        outcome = f"{terms.prefix}/connected"
        if self.rank == 0:
            assert call is not None
            self._board.post(outcome, self._welcome(call, open_session, limit))
        if (reason := self._board.read(outcome, seconds=limit.left + MARGIN)) is not None:
            raise TransferError(reason)

    def _terms(self) -> Terms:
        o = self.options
        return Terms(
            host=o.host,
            port=self._board.port,
            trainer=self._name,
            epoch=self._epoch,
            trainers=self.world,
            engines=getattr(self.client, "engines", 1),
            workers=o.workers,
            seconds=o.seconds,
            bucket_bytes=o.bucket_bytes,
            backend=o.backend,
        )

    def _invite(self, terms: Terms, limit: Deadline) -> tuple[_Call, bool]:
        """Ask the workers in, put both layouts together and post them; returns the RPC and whether an update that
        an earlier trainer began is still open."""
        call = self._start(lambda: self.client.init_weight_transfer_engine(asdict(terms)))
        try:
            trainers = [
                self._board.read(f"{terms.prefix}/trainer/{r}", seconds=limit.left) for r in range(self.world)
            ]
            workers: dict[tuple[int, int], Mapping[str, Any]] = {}
            for engine in range(terms.engines):
                index, count = 0, 1
                while index < count:
                    hello = self._await(terms.hello(engine, index), call, limit)
                    if "refused" in hello:
                        raise TransferError(hello["refused"])
                    workers[engine, index], count = hello, hello["count"]
                    index += 1
            if refused := [note["refused"] for note in trainers if "refused" in note]:
                raise BridgeError(refused[0])
            joined = join_sides(trainers, workers)
            views = names_differ(joined.source, joined.destination)
            self._board.post(f"{terms.prefix}/ask", "views" if views else "nothing")
            data = joined.to_json()
            if views:
                data["views"] = self._await(f"{terms.prefix}/views", call, limit)
                joined = Sides.from_json(data)
            self._plan(joined)  # refuses here what does not fit, for all
            self._board.post(f"{terms.prefix}/sides", data)
            return call, any(hello["open"] for hello in workers.values())
        except (TransferError, BridgeError) as error:
            self._board.post(f"{terms.prefix}/ask", "nothing")
            self._board.post(
                f"{terms.prefix}/sides", {"refused": str(error), "mistake": isinstance(error, BridgeError)}
            )
            raise

    def _plan(self, sides: Sides) -> Plan:
        """Made once and kept, also over connections."""
        if self._planned is None or self._planned[0] != sides:
            self._planned = (sides, sides.plan())
        return self._planned[1]

    def _welcome(self, call: _Call, open_session: bool, limit: Deadline) -> str | None:
        """Wait until all workers are in; the reason if one is not."""
        assert self._link is not None
        terms = self._link.terms
        try:
            for engine, index in self._link.sides.workers:
                problem = self._await(f"{terms.prefix}/joined/{engine}.{index}", call, limit)
                if problem is not None:
                    return problem
            call.result(limit.left + MARGIN)
            if open_session:
                self._finish_quietly(Deadline(limit.left))
        except TransferError as error:
            return str(error)
        return None

    # Updates

    def send_weights(self, version: str | int | None = None) -> Report:
        """Send all weights as they are now; returns when the engine serves them.

        Args:
            version: Name of these weights; else "1", "2", ...

        Raises:
            TransferError: Nothing changed in the engine; the reason.
            BridgeError: The source's tensors are not those of the connection.
        """
        return self._collective(lambda call: self._update(call, "dense", (), None, version))

    def send_sparse(
        self, patches: Iterable[Patch], version: str | int | None = None, *, base: str | None = None
    ) -> Report:
        """Send changed elements; every rank gives its own, together each element once.

        Args:
            patches: In global coordinates of the trainer's or of Hugging Face's tensors (`changed` makes them).
            version: Name of the weights after it.
            base: Version that the engine must have; else that of this trainer's last update. A trainer that has
                not sent any says "default" if the engine was started from the weights that it started from.

        Raises:
            BridgeError: An unknown name, an index outside its tensor or given twice, or no base.
            TransferError: Nothing changed in the engine; the reason.
        """
        base = self._version if base is None else base
        if base is None:
            raise BridgeError(
                "no update was sent yet: call send_weights first, or say base='default' if the engine was started "
                "from the same weights"
            )
        given = tuple(patches)
        return self._collective(lambda call: self._update(call, "sparse", given, base, version))

    def _update(
        self,
        call: str,
        kind: Literal["dense", "sparse"],
        patches: tuple[Patch, ...],
        base: str | None,
        version: str | int | None,
    ) -> Report:
        started = time.monotonic()
        link = self._link
        assert link is not None, "_collective connects"
        self._rounds += 1
        number = self._rounds
        name = str(self._committed + 1 if version is None else version)
        transmit = self._prepare(call, kind, patches)
        link.transport.reset_counters()
        limit = Deadline(self.options.seconds)
        if self.rank:
            self._follow(link, number, limit, transmit)
            told: dict[str, Any] = {}
        else:
            told = self._lead(link, number, limit, transmit, {"version": name, "base": base, "kind": kind})
        self._version = name
        self._committed += 1
        sent = {peer - link.sides.trainers: n for peer, n in link.transport.sent.items()}
        if kind == "dense":
            assert sum(sent.values()) == link.planned, "other bytes were sent than planned"
        return Report(
            version=name,
            kind=kind,
            seconds=time.monotonic() - started,
            sent=sent,
            lower_bound=link.plan.lower_bound if kind == "dense" else 0,
            **told,
        )

    def _prepare(self, call: str, kind: str, patches: tuple[Patch, ...]) -> Callable[[Deadline], None]:
        """What this rank will send, as a function that sends it.

        What can be refused is refused here, by one rank for all, before the engine hears of it.
        """
        link, sender = self._link, self._sender
        assert link is not None
        assert sender is not None
        problem: str | None = None
        outbox, local = Outbox(), {}
        try:
            if kind == "sparse":
                outbox = link.router().route(patches)
            else:
                local = self.source.local()
                if self.source.signature() != self._said:
                    raise BridgeError(
                        "the tensors are not those that the connection was made for; make a new Trainer"
                    )
        except BridgeError as error:
            problem = f"trainer rank {self.rank}: {error}" if self.world > 1 else str(error)
        self._board.post(f"{call}/ready/{self.rank}", problem)
        limit = Deadline(self.options.seconds)
        for rank in range(self.world):
            if (found := self._board.read(f"{call}/ready/{rank}", seconds=limit.left)) is not None:
                raise BridgeError(found)

        def transmit(deadline: Deadline) -> None:
            try:
                if kind == "dense":
                    sender.send(local, deadline)
                else:
                    layout, most = link.sides.destination, link.terms.bucket_bytes
                    send_sparse(link.transport, outbox, layout, link.workers, deadline, most)
            except TransferError:
                link.close()
                raise

        return transmit

    def _follow(self, link: Link, number: int, limit: Deadline, transmit: Callable[[Deadline], None]) -> None:
        """An update on a rank other than 0."""
        problem: str | None = None
        go = link.board.read(link.note(number, "go"), seconds=limit.left + MARGIN)
        if go is None:
            try:
                transmit(limit)
            except TransferError as error:
                problem = str(error)
        done = link.board.read(link.note(number, "done"), seconds=limit.left + 4 * MARGIN)
        if done is not None or problem is not None:
            raise TransferError(done or problem)

    def _lead(
        self,
        link: Link,
        number: int,
        limit: Deadline,
        transmit: Callable[[Deadline], None],
        what: dict[str, Any],
    ) -> dict[str, Any]:
        """An update on rank 0; returns what it learnt for the report."""
        started = time.monotonic()
        phases: dict[str, float] = {}
        received: dict[int, int] = {}
        problem: str | None = None
        paused = False
        try:
            paused = self._pause(limit)
            self._call(self.client.start_weight_update, limit)
            self._session = True
            info = {
                **what,
                "host": link.terms.host,
                "port": link.terms.port,
                "trainer": link.terms.trainer,
                "epoch": link.terms.epoch,
                "round": number,
                "first": link.sides.trainers,
            }
            call = self._start(lambda: self.client.update_weights(info))
            for worker in link.workers:
                if reason := self._await(link.note(number, f"ready/{worker}"), call, limit):
                    raise TransferError(reason)
            link.board.post(link.note(number, "go"), None)
            phases["ready"] = time.monotonic() - started
            received = self._transmit_and_hear(link, number, limit, transmit, call)
            phases["received"] = time.monotonic() - started
            call.result(limit.left + MARGIN)
            link.board.post(link.note(number, "decision"), "take")
            self._call(self.client.finish_weight_update, limit)
            self._session = False
            for worker in link.workers:
                if reason := self._await(link.note(number, f"applied/{worker}"), None, limit):
                    raise TransferError(reason)
            phases["live"] = time.monotonic() - started
            self._settle(what["version"], limit)
        except Exception as error:
            problem = str(error)
            link.close()
            self._give_up(link, number, problem)
            raise error if isinstance(error, TransferError) else TransferError(problem) from error
        finally:
            if paused:
                self._quietly("resume_generation")
            link.board.post(link.note(number, "done"), problem)
        return {"received": received, "phases": phases}

    def _transmit_and_hear(
        self, link: Link, number: int, limit: Deadline, transmit: Callable[[Deadline], None], call: _Call
    ) -> dict[int, int]:
        """Send, and wait until all workers have everything; returns the bytes that each received."""
        received: dict[int, int] = {}
        own: str | None = None
        try:
            transmit(limit)
        except TransferError as error:
            own = str(error)  # a worker may know better why
        for worker in link.workers:
            index = worker - link.sides.trainers
            try:
                got = self._await(link.note(number, f"got/{worker}"), call, limit)
            except TransferError as error:
                raise TransferError(own or str(error)) from None
            if "error" in got:
                raise TransferError(f"worker {index}: {got['error']}")
            received[index] = got["bytes"]
        if own is not None:
            raise TransferError(own)
        return received

    def _give_up(self, link: Link, number: int, problem: str) -> None:
        """End the session in the engine, if it can be reached; else the next connection does it."""
        for what in (
            "go",
            "decision",
        ):  # a note is written once: where it went out already this changes nothing
            if not link.board.has(link.note(number, what)):
                link.board.post(link.note(number, what), problem)
        if self._session:
            self._finish_quietly(Deadline(MARGIN))

    def _finish_quietly(self, limit: Deadline) -> None:
        with contextlib.suppress(TransferError):
            self._call(self.client.finish_weight_update, limit)
            self._session = False

    # The engine's control plane

    def _start(self, function: Callable[[], Any]) -> _Call:
        self._pending = _Call(function, after=self._pending)
        return self._pending

    def _call(self, function: Callable[[], Any], limit: Deadline) -> None:
        self._start(function).result(limit.left + MARGIN)

    def _await(self, key: str, call: _Call | None, limit: Deadline) -> Any:
        """A note of a worker; fails early if the RPC that keeps it busy failed."""
        end, pause = Deadline(limit.left + MARGIN), 0.0005
        while not self._board.has(key):
            if call is not None and call.failed and not self._board.has(key):
                call.result(0)
            if end.over:
                raise TransferError(f"waited for {key}: no answer within the time limit")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        return self._board.read(key, seconds=MARGIN)

    def _pause(self, limit: Deadline) -> bool:
        pause, mode = getattr(self.client, "pause_generation", None), self.options.pause
        if pause is None or mode is None:
            return False
        self._call(lambda: pause(mode), limit)
        return True

    def _settle(self, version: str, limit: Deadline) -> None:
        """What has to follow new weights: no prefix of old ones is used again, and the engine tells its version."""
        if reset := getattr(self.client, "reset_prefix_cache", None):
            self._call(reset, limit)
        if tell := getattr(self.client, "update_weight_version", None):
            self._call(lambda: tell(version), limit)

    def _quietly(self, method: str) -> None:
        with contextlib.suppress(TransferError):
            self._call(getattr(self.client, method), Deadline(MARGIN))

    def shutdown(self) -> None:
        """Leave the engine to another trainer."""
        self._drop()
        if self.rank == 0 and (leave := getattr(self.client, "shutdown_weight_transfer_engine", None)):
            leave()

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link, self._sender = None, None


class _Call(threading.Thread):
    """One call of the client, beside the data; after the one before, since clients take one at a time."""

    def __init__(self, function: Callable[[], Any], *, after: _Call | None) -> None:
        super().__init__(daemon=True)
        self._function, self._after = function, after
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        if self._after is not None:
            self._after.join()
            self._after = None
        try:
            self._function()
        except Exception as error:
            self._error = error

    @property
    def failed(self) -> bool:
        return not self.is_alive() and self._error is not None

    def result(self, seconds: float) -> None:
        """Wait for the end. Raises TransferError with what the engine said, or after the time."""
        self.join(seconds)
        if self.is_alive():
            raise TransferError("the engine did not answer within the time limit")
        if self._error is not None:
            raise TransferError(f"the engine refused: {self._error}")
