"""One connection between all trainer ranks and all workers: made once, used for many updates."""

from __future__ import annotations

import torch

from titan_bridge.sharding.plan import Plan
from titan_bridge.transfer.board import Board
from titan_bridge.transfer.exchange import Sides
from titan_bridge.transfer.lanes import Message, in_turn, lanes
from titan_bridge.transfer.payload import Terms
from titan_bridge.transfer.sparse import Router
from titan_bridge.transfer.transport import Transport, make_group


class Link:
    """The plan, the group and the lanes of one member of a connection."""

    def __init__(
        self,
        *,
        board: Board,
        terms: Terms,
        sides: Sides,
        rank: int,
        plan: Plan | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Blocks until all members have come. `rank` is that in the group.

        Raises:
            BridgeError: The two sides do not fit together.
            TransferError: Somebody did not come within the time.
        """
        self.board, self.terms, self.sides, self.rank = board, terms, sides, rank
        self.plan = sides.plan() if plan is None else plan
        self.is_trainer = rank < sides.trainers
        dtypes = {name: param.dtype for name, param in sides.destination.params.items()}
        end = {"sender": rank} if self.is_trainer else {"receiver": rank}
        self.messages: tuple[Message, ...] = in_turn(
            lanes(self.plan, dtypes, bucket_bytes=terms.bucket_bytes, **end),
            rank=rank,
            trainers=sides.trainers,
            workers=sides.size - sides.trainers,
        )
        """Of a dense update."""
        self.planned: int = (self.plan.sent if self.is_trainer else self.plan.received).get(rank, 0)
        """Bytes that this rank sends or receives in a dense update."""
        self.device = device if terms.backend == "nccl" and device is not None else torch.device("cpu")
        group = make_group(
            board.store(f"{terms.prefix}/group"),
            rank=rank,
            size=sides.size,
            backend=terms.backend,
            seconds=terms.seconds,
        )
        self.transport = Transport(group, rank=rank, backend=terms.backend, device=self.device)
        self.broken = False

    @property
    def workers(self) -> range:
        """Ranks of the workers in the group."""
        return range(self.sides.trainers, self.sides.size)

    def router(self) -> Router:
        """For sparse updates, on trainer ranks."""
        return Router(self.sides.destination, self.sides.all_views())

    def note(self, round: int, what: str) -> str:
        """Key of a note about one round."""
        return f"{self.terms.prefix}/round{round}/{what}"

    def close(self) -> None:
        """Leave; everybody who waits for this rank fails at once."""
        self.broken = True
        self.transport.close()
