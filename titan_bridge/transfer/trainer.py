"""The trainer's side of a transfer, without vLLM: every trainer rank makes one, rank 0 talks to the engine.

Whatever goes wrong before an update is decided ends in no change and a TransferError on every rank, and the next
update makes a new connection by itself. `rounds` has one update, `meeting` has how a connection comes about.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Literal

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.plan import Plan
from titan_bridge.transfer.board import Board
from titan_bridge.transfer.changes import Snapshot
from titan_bridge.transfer.control import MARGIN, Call, Control
from titan_bridge.transfer.dense import Deadline, DenseSender
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.exchange import Sides
from titan_bridge.transfer.link import Link
from titan_bridge.transfer.meeting import invite, welcome
from titan_bridge.transfer.options import Client, Options, Report
from titan_bridge.transfer.packets import send_sparse
from titan_bridge.transfer.payload import Terms
from titan_bridge.transfer.rounds import Transmit, follow, lead
from titan_bridge.transfer.source import TensorSource
from titan_bridge.transfer.sparse import Outbox, Patch


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
        self._control = Control(client, self._board, o.pause)
        if rank == 0:
            self._board.post("trainer", uuid.uuid4().hex)
        self._name: str = self._board.read("trainer", seconds=o.seconds)
        self._link: Link | None = None
        self._sender: DenseSender | None = None
        self._said: dict[str, tuple] = {}
        self._epoch = self._calls = self._rounds = 0
        self._version: str | None = None
        self._committed = 0
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
        call: Call | None = None
        open_session = False
        if self.rank == 0:
            call, open_session = invite(self._board, self._control, terms, self._plan, limit)
        note = self._board.read(f"{terms.prefix}/sides", seconds=limit.left + MARGIN)
        if "refused" in note:
            raise (BridgeError if note.get("mistake") else TransferError)(note["refused"])
        sides = Sides.from_json(note)
        plan = self._plan(sides)
        self._link = Link(board=self._board, terms=terms, sides=sides, rank=self.rank, plan=plan)
        self._sender = DenseSender(self._link.transport, self._link.messages)
        outcome = f"{terms.prefix}/connected"
        if self.rank == 0:
            assert call is not None
            self._board.post(outcome, welcome(self._link, self._control, call, open_session, limit))
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

    def _plan(self, sides: Sides) -> Plan:
        """Made once and kept, also over connections."""
        if self._planned is None or self._planned[0] != sides:
            self._planned = (sides, sides.plan())
        return self._planned[1]

    # Updates

    def snapshot(self) -> Snapshot:
        """The source's tensors as they are now, in the engine's dtypes: what `changed` takes as `before`.

        Raises:
            BridgeError: Not connected.
        """
        if self._link is None:
            raise BridgeError("the engine's dtypes are not known yet: call connect or send_weights first")
        return Snapshot(self.source.tensors(), dtypes=self._link.sides.engine_dtypes())

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
            told = follow(link, number, limit, transmit)
        else:
            what = {"version": name, "base": base, "kind": kind}
            told = lead(link, self._control, number, limit, transmit, what)
        self._version = name
        self._committed += 1
        if kind == "dense":
            assert sum(told["sent"][self.rank]) == link.planned, "other bytes were sent than planned"
        return Report(
            version=name,
            kind=kind,
            seconds=time.monotonic() - started,
            sent=told["sent"],
            received=dict(enumerate(told["received"])),
            lower_bound=link.plan.lower_bound if kind == "dense" else 0,
            phases=told["phases"],
        )

    def _prepare(self, call: str, kind: str, patches: tuple[Patch, ...]) -> Transmit:
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

    def shutdown(self) -> None:
        """Leave the engine to another trainer."""
        self._drop()
        if self.rank == 0 and (leave := getattr(self.client, "shutdown_weight_transfer_engine", None)):
            leave()

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link, self._sender = None, None
