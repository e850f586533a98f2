"""How trainer ranks agree: the others ask rank 0, and rank 0 answers all, in numbered calls of one or more steps.

All over authenticated connections, and none over torch.distributed: a background thread may do it beside the trainer's
own collectives, and a rank that was late, stalled or cut off is in step again at its next call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from titan_bridge.errors import BridgeError
from titan_bridge.transfer.errors import PeerLost, TransferError, described
from titan_bridge.transfer.protocol import MARGIN
from titan_bridge.transfer.wire import Connection, Deadline, Listener, connect

Make = Callable[[], Mapping[str, Any]]  # makes the message of this rank
Then = Callable[[list[dict[str, Any]], Deadline], Mapping[str, Any]]
"""What rank 0 makes of all ranks' messages."""


class Ranks:
    """One rank's way to the others."""

    def __init__(
        self, rank: int, world: int, listener: Listener, address: tuple[str, int], secret: bytes
    ) -> None:
        """`address`: where rank 0 listens."""
        self.rank, self.world = rank, world
        self._listener, self._address, self._secret = listener, address, secret
        self._others: dict[int, Connection] = {}
        self._call = 0

    def begin(self) -> None:
        """The next call of all ranks."""
        self._call += 1
        self._step = 0

    def exchange(self, make: Make, then: Then, limit: Deadline, more: int = 0) -> dict[str, Any]:
        """One step: every rank makes its message, and rank 0 of all of them an answer, which all ranks get.

        `more`: how often `then` takes the same time anew (`Deadline.anew`); others wait for rank 0 as long.
        What `make` raises on any rank is a BridgeError on every rank; what `then` raises, too, is heard by all.
        TransferError where another rank is late or gone.
        """
        self._step += 1
        at = [self._call, self._step]
        try:
            mine = dict(make())
        except Exception as error:
            mine = {"problem": f"trainer rank {self.rank}: " * (self.world > 1) + described(error)}
        if self.rank == 0:
            return self._lead(mine, then, limit)
        try:
            if 0 not in self._others:
                hello = {"role": "rank", "rank": self.rank, "who": f"trainer rank {self.rank}"}
                self._others[0] = connect(*self._address, self._secret, hello, limit)
            self._others[0].send({"at": at, **mine}, limit)
            end = Deadline(limit.left + more * limit.seconds + 4 * MARGIN)  # rank 0 waits for others, too
            while (answer := self._others[0].receive(end)).pop("at") != at:
                pass  # to what this rank has given up already
        except TransferError as error:
            self._drop(0)  # an answer that comes after all belongs to nothing
            raise TransferError(f"trainer rank 0: {error}") from None
        if "error" in answer:
            self._call = answer["call"]
            raise (BridgeError if answer["mistake"] else TransferError)(answer["error"])
        return answer

    def _lead(self, mine: dict[str, Any], then: Then, limit: Deadline) -> dict[str, Any]:
        failed = None
        try:
            given = [mine, *(self._hear(rank, limit) for rank in range(1, self.world))]
            if problems := [said["problem"] for said in given if "problem" in said]:
                raise BridgeError(problems[0])
            answer = dict(then(given, limit))
        except Exception as error:
            failed, answer = error, _error(error, self._call)
        for rank, connection in list(self._others.items()):
            try:
                connection.send({"at": [self._call, self._step], **answer}, Deadline(MARGIN))
            except TransferError:
                self._drop(rank)
        if failed is not None:
            raise failed
        return answer

    def _hear(self, rank: int, limit: Deadline) -> dict[str, Any]:
        while True:
            try:
                if rank not in self._others or not self._others[rank].alive():
                    self._drop(rank)
                    if self._step > 1:
                        raise TransferError(f"trainer rank {rank} is gone")
                    self._others[rank] = self._listener.take(1, limit, role="rank", rank=rank)[-1]
                # Its own limit began a little later, and it may have waited for an engine until then.
                said = self._others[rank].receive(Deadline(limit.left + MARGIN / 2))
            except PeerLost as error:
                if limit.over:
                    raise TransferError(f"trainer rank {rank} did not come in time ({error})") from None
                self._drop(rank)
                continue
            call, step = said["at"]
            if (call, step) == (self._call, self._step):
                return said
            # One was away while the other gave a call up; from the next one on they are in step.
            late = TransferError(f"trainer rank {rank} is at call {call}, rank 0 at {self._call}: one late")
            behind = (call, step) < (self._call, self._step)
            answer = _error(late, self._call - 1 if behind else self._call)
            self._others[rank].send({"at": said["at"], **answer}, limit)
            if not behind:
                raise late

    def _drop(self, rank: int) -> None:
        if (connection := self._others.pop(rank, None)) is not None:
            connection.close()

    def close(self) -> None:
        for rank in list(self._others):
            self._drop(rank)


def _error(error: Exception, call: int) -> dict[str, Any]:
    """`call`: what the rank that hears it counts as its last one."""
    return {"error": described(error), "mistake": isinstance(error, BridgeError), "call": call}
