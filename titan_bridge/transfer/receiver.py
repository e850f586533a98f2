"""The engine's side of a transfer on one worker, without vLLM: what its methods must do and nothing more.

An update is all or nothing:

- Its bytes go to staging. An undo log would take as much memory (the old values of all that is overwritten), but
  between `update_weights` and `finish_weight_update` vLLM may run steps, and with an undo log these would compute
  with half an update; a worker killed there would leave its peers with one. With staging, giving up is free, and
  live tensors are written in one place, inside `finish`, by copies that cannot fail for want of a peer.
- `finish` takes the update only if the trainer decided so after every worker said that all of its bytes have
  arrived, and if every worker is inside `finish` too and one of them at least has read that decision. So a trainer
  that dies at any moment leaves all workers on one side.

Errors go to the trainer over the board, and it raises them. `connect` raises, too, and so does `update` of a trainer
that is not connected. After `update` has begun it returns whatever happens: vLLM ends the session of a worker that
raises there, and the others would wait for it in `finish`. `finish` raises on all workers when the update was not
taken, so that nobody gives the old weights a new version; vLLM then leaves the session open, and a second `finish`
ends it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from titan_bridge.errors import BridgeError
from titan_bridge.transfer.board import Board
from titan_bridge.transfer.dense import Deadline, Staged, apply_dense
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.joining import Connection, join, refusal
from titan_bridge.transfer.link import Link
from titan_bridge.transfer.packets import Arrived, apply_sparse, receive_sparse
from titan_bridge.transfer.payload import Terms, Update
from titan_bridge.transfer.target import Target, signature

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handlers, without importing it

UNKNOWN_VERSION = "default"
"""What vLLM, too, calls the weights that an engine was started with."""
BROKEN_VERSION = "broken"
"""After a dense update that a loader of vLLM's could not finish."""


@dataclasses.dataclass(kw_only=True)
class _Round:
    number: int
    version: str
    dense: Staged | None = None
    sparse: list[Arrived] | None = None


class Receiver:
    """One worker: `connect`, then for every update `begin`, `update`, `finish`."""

    def __init__(self, target: Target, *, keep_staging: bool = True, bounce: bool = False) -> None:
        """
        Args:
            keep_staging: Hold the memory of the staging between updates instead of asking for it again.
            bounce: See `DenseReceiver`.
        """
        self.target = target
        self.version = UNKNOWN_VERSION
        """Of the weights that are live."""
        self.error: str | None = None
        """Why the last call did nothing, for logs and tests."""
        self._keep, self._bounce = keep_staging, bounce
        self._connection: Connection | None = None
        self._open = False
        self._begun = False
        """Whether the session has had an update."""
        self._round: _Round | None = None

    # Connecting

    def connect(self, terms: Terms) -> None:
        """Meet a trainer; drops the one before if that is gone, and refuses the new one if not.

        Raises:
            TransferError: Why this worker is not connected with it.
        """
        self.error = None
        try:
            board = Board.join(terms.host, terms.port, seconds=terms.seconds)
            if why := refusal(terms, self._connection):
                board.post(terms.hello(terms.engine, self.target.index), {"refused": why})
                raise TransferError(why)
        except TransferError as error:
            self._fail(str(error))
            raise
        self._drop()
        try:
            self._connection = join(
                board, terms, self.target, version=self.version, session=self._open, bounce=self._bounce
            )
            board.post(self._joined(terms), None)
        except Exception as error:
            self._drop()
            self._fail(_text(error))
            self._tell_why(board, terms, _text(error))
            raise TransferError(_text(error)) from error

    def _tell_why(self, board: Board, terms: Terms, why: str) -> None:
        hello = terms.hello(terms.engine, self.target.index)
        try:
            if not board.has(hello):
                board.post(hello, {"refused": why})
            board.post(self._joined(terms), why)
        except TransferError as error:
            logger.error("%s", error)

    def _joined(self, terms: Terms) -> str:
        return f"{terms.prefix}/joined/{terms.engine}.{self.target.index}"

    # One update

    def begin(self) -> None:
        """`start_weight_update`."""
        self._open, self._begun, self._round, self.error = True, False, None, None

    def update(self, info: Update) -> None:
        """`update_weights`: stage one update. Reports over the board whether all of it is here.

        Raises:
            TransferError: Not connected with this trainer.
        """
        self.error, self._round = None, None
        now = self._connection
        caller = (info.trainer, info.epoch)
        if now is None or now.link.broken or caller != (now.link.terms.trainer, now.link.terms.epoch):
            self._open = False
            raise TransferError(self._refuse_stranger(info))
        self._begun = True
        link = now.link
        deadline = Deadline(link.terms.seconds)
        ready = link.note(info.round, f"ready/{link.rank}")
        try:
            self._verify(info, now.expected)
            if info.kind == "dense":
                now.dense.prepare()
        except TransferError as error:
            self._fail(str(error))
            self._tell(link.board, ready, str(error))
            return
        try:
            link.board.post(ready, None)
            if (stop := link.board.read(link.note(info.round, "go"), seconds=deadline.left)) is not None:
                raise TransferError(stop)
            self._round = self._stage(info, now, deadline)
        except Exception as error:
            self._fail(_text(error))
            link.close()
            self._tell(link.board, link.note(info.round, f"got/{link.rank}"), {"error": _text(error)})
            return
        self._tell(link.board, link.note(info.round, f"got/{link.rank}"), {"bytes": self.bytes_received})

    @property
    def bytes_received(self) -> int:
        """In the last update, counted at the transport."""
        return sum(self._connection.link.transport.received.values()) if self._connection else 0

    @property
    def staging_bytes(self) -> int:
        """Memory of the host that the staging of dense updates holds now."""
        return self._connection.dense.staging_bytes if self._connection else 0

    @property
    def buffer_bytes(self) -> int:
        """Memory that messages of dense updates pass through on their way to the staging: at most two buckets."""
        return self._connection.dense.buffer_bytes if self._connection else 0

    def _refuse_stranger(self, info: Update) -> str:
        text = (
            f"weight transfer not initialized: worker {self.target.index} is not connected with this trainer; "
            "call init_weight_transfer_engine first"
        )
        self._fail(text)
        try:
            board = Board.join(info.host, info.port, seconds=5)
            board.post(f"{info.trainer}/{info.epoch}/round{info.round}/ready/{info.first}", text)
        except TransferError as error:
            logger.error("%s", error)
        return text

    def _verify(self, info: Update, live_then: Mapping[str, tuple]) -> None:
        """Before a byte moves: the order, the base and the live tensors are what the plan was made for."""
        if not self._open:
            raise TransferError("an update without start_weight_update")
        if info.base is not None and info.base != self.version:
            raise TransferError(
                f"patches for version {info.base!r}, but worker {self.target.index} has {self.version!r}"
            )
        live = self.target.tensors()
        for name, expected in live_then.items():
            if name not in live or signature(live[name]) != expected:
                now = signature(live[name]) if name in live else "gone"
                raise TransferError(
                    f"{name} on worker {self.target.index} is {now}; the plan was made for {expected}. "
                    "Call trainer_init again"
                )

    def _stage(self, info: Update, now: Connection, deadline: Deadline) -> _Round:
        link = now.link
        link.transport.reset_counters()
        staged = _Round(number=info.round, version=info.version)
        if info.kind == "dense":
            staged.dense = now.dense.receive(deadline)
            got = self.bytes_received
            assert got == link.planned, f"{got} bytes came, the plan says {link.planned}"
        else:
            shapes = {name: tensor.shape for name, tensor in self.target.tensors().items()}
            staged.sparse = receive_sparse(
                link.transport,
                link.sides.destination,
                link.rank,
                range(link.sides.trainers),
                shapes,
                deadline,
                link.terms.bucket_bytes,
            )
        return staged

    def finish(self) -> None:
        """`finish_weight_update`: take the staged update on all workers, or drop it on all.

        Raises:
            TransferError: There was an update, and it was not taken.
        """
        staged, self._round = self._round, None
        begun, self._begun, self._open = self._begun, False, False
        now = self._connection
        if now is None or not begun:
            return
        link = now.link
        # Those who have nothing take part, too: the others wait for their word.
        mine = staged is not None and not link.broken and self._decided(link, staged)
        if not self._agree(now, mine) or staged is None:
            self._open = True  # as for vLLM
            self._fail(
                f"the update was not taken: {self.error or 'not all workers have it, or no trainer decided'}"
            )
            if staged is not None:
                self._tell(link.board, link.note(staged.number, f"applied/{link.rank}"), self.error)
            raise TransferError(self.error)
        applied = link.note(staged.number, f"applied/{link.rank}")
        try:
            self._apply(staged)
        except Exception as error:
            # vLLM's loaders may raise anything, and the weights are then neither the old ones nor the new.
            self.version, self._open = BROKEN_VERSION, True
            self._fail(
                f"worker {self.target.index} has broken weights until the next dense update: {error!r}"
            )
            self._tell(link.board, applied, self.error)
            self._drop()  # the other workers have finished, and will not agree on anything
            raise TransferError(self.error) from error
        self.version = staged.version
        if not self._keep:
            now.dense.release()
        self._tell(link.board, applied, None)

    def _apply(self, staged: _Round) -> None:
        live = self.target.tensors()
        if staged.dense is not None:
            params, device = self.target.layout.params, next(iter(live.values())).device
            whole = {
                name: torch.empty(params[name].shape, dtype=dtype, device=device)
                for name, dtype in self.target.whole.items()
            }
            names = apply_dense(staged.dense, {**live, **whole})
            if whole:
                self.target.load(whole)
            for name, shadow in staged.dense.shadows.items():
                assert self.target.swap is not None
                staged.dense.shadows[name] = self.target.swap(name, shadow)
                names.add(name)
        else:
            assert staged.sparse is not None
            names = apply_sparse(staged.sparse, live)
        self.target.on_change(sorted(names & live.keys()))

    def _decided(self, link: Link, staged: _Round) -> bool:
        # The trainer posts its decision before it calls finish: a second is for somebody who calls it out of order.
        try:
            return link.board.read(link.note(staged.number, "decision"), seconds=1) == "take"
        except TransferError:
            return False

    @staticmethod
    def _agree(now: Connection, mine: bool) -> bool:
        """True when every worker takes part and one of them knows that the update is to be taken."""
        if now.peers is None:
            return mine
        seen = torch.tensor([int(mine)])
        try:
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
            now.peers.allreduce([seen], options).wait()
        except RuntimeError as error:
            logger.error("workers lost each other: %s", error)
            now.link.close()
            return False
        return bool(seen.item())

    # Ends

    def shutdown(self) -> None:
        """Leave the trainer; the weights stay."""
        self._drop()

    def describe(self) -> dict[str, Any]:
        """Version and layout, in plain types."""
        return {
            "version": self.version,
            "connected": self._connection is not None and not self._connection.link.broken,
            "error": self.error,
            "layout": json.loads(json.dumps(self.target.layout.to_json())),
        }

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.link.close()
        self._connection, self._round = None, None

    def _fail(self, text: str) -> None:
        self.error = text
        logger.error("weight transfer: %s", text)

    @staticmethod
    def _tell(board: Board, key: str, value: Any) -> None:
        """Post a note to a trainer that may be gone."""
        try:
            board.post(key, value)
        except TransferError as error:
            logger.error("%s", error)


def _text(error: Exception) -> str:
    """What is told of an error: whatever it is, the others must hear of it now and not wait for this worker."""
    if isinstance(error, BridgeError | TransferError):
        return str(error)
    logger.exception("weight transfer")
    return f"{type(error).__name__}: {error}"
