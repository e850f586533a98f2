"""How a worker comes to a connection with a trainer; `meeting` is the trainer's side of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from titan_bridge.transfer.board import Board
from titan_bridge.transfer.dense import Deadline, DenseReceiver
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.exchange import Sides
from titan_bridge.transfer.link import Link
from titan_bridge.transfer.payload import VERSION, Terms
from titan_bridge.transfer.target import Target, signature, unshared
from titan_bridge.transfer.transport import make_group


@dataclasses.dataclass(frozen=True, kw_only=True)
class Connection:
    """What a worker has once it is connected."""

    link: Link
    peers: Any
    """A gloo group of all workers, or None where there is only one."""
    dense: DenseReceiver
    expected: Mapping[str, tuple]
    """Signatures of the live tensors that the plan was made for."""

    @property
    def alive(self) -> bool:
        """Whether the trainer is still there."""
        return not self.link.broken and self.link.board.alive()


def refusal(terms: Terms, now: Connection | None) -> str | None:
    """Why a worker that has `now` does not connect with this trainer; None: it does."""
    if terms.version != VERSION:
        return f"the trainer speaks version {terms.version} of this protocol, the engine version {VERSION}"
    if now is None or now.link.terms.trainer == terms.trainer or not now.alive:
        return None
    theirs = now.link.terms
    return f"the engine is connected with another trainer, at {theirs.host}:{theirs.port}; shut that one down first"


def join(
    board: Board, terms: Terms, target: Target, *, version: str, session: bool, bounce: bool
) -> Connection:
    """Tell the trainer what this worker holds, hear what all others do, and make the plan and the groups.

    Args:
        version: Of the live weights.
        session: Whether an update has been started and not finished.
        bounce: See `DenseReceiver`.

    Raises:
        BridgeError: The two sides do not fit together.
        TransferError: A live tensor is not what its spec says, or somebody did not come within the time.
    """
    limit = Deadline(terms.seconds)
    live = target.tensors()
    for name, tensor in live.items():
        if name in target.layout.params:
            _check(target, name, tensor)
    board.post(
        terms.hello(terms.engine, target.index),
        {
            "count": terms.workers or target.count,
            "rank": target.rank,
            "layout": target.layout.to_json(),
            "unpadded": {name: list(shape) for name, shape in target.unpadded.items()},
            "version": version,
            "open": session,
        },
    )
    asked = (terms.engine, target.index) == (0, 0) and board.read(f"{terms.prefix}/ask", seconds=limit.left)
    if asked == "views":
        board.post(f"{terms.prefix}/views", [dataclasses.asdict(view) for view in target.views()])
    note = board.read(f"{terms.prefix}/sides", seconds=limit.left)
    if "refused" in note:
        raise TransferError(note["refused"])
    sides = Sides.from_json(note)
    rank = sides.rank_of((terms.engine, target.index))
    device = next(iter(live.values())).device
    link = Link(board=board, terms=terms, sides=sides, rank=rank, device=device)
    whole = unshared(live) if target.swap is not None and link.device == device else {}
    peers = None
    if len(sides.workers) > 1:
        peers = make_group(
            board.store(f"{terms.prefix}/workers"),
            rank=rank - sides.trainers,
            size=len(sides.workers),
            backend="gloo",
            seconds=terms.seconds,
        )
    return Connection(
        link=link,
        peers=peers,
        dense=DenseReceiver(link.transport, link.messages, whole, target.memory, bounce=bounce),
        expected={name: signature(tensor) for name, tensor in live.items()},
    )


def _check(target: Target, name: str, tensor: torch.Tensor) -> None:
    want = target.layout.local_shape(name, target.rank)
    dtype = target.layout.params[name].dtype
    if tuple(tensor.shape) != want or f"torch.{dtype}" != str(tensor.dtype):
        raise TransferError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} here, its spec says {dtype} {want}"
        )
    if not tensor.is_contiguous():
        raise TransferError(f"{name} is not contiguous on worker {target.index}")
