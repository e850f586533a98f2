"""Point-to-point messages between trainer ranks and engine workers, counted, over one process group.

The group is made from a store alone, so it touches neither the trainer's nor the engine's own groups: ranks
`0..trainers-1` are the trainer's, the workers follow. gloo on CPUs, NCCL on GPUs. When one side closes its end,
everybody who waits for it fails at once: that is how a fault spreads before any time limit.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from titan_bridge.transfer.errors import TransferError

Backend = Literal["gloo", "nccl"]


def make_group(store: dist.Store, *, rank: int, size: int, backend: Backend, seconds: float) -> Any:
    """A process group that torch.distributed's global state knows nothing of."""
    limit = timedelta(seconds=seconds)
    try:
        if backend == "gloo":
            return dist.ProcessGroupGloo(store, rank, size, limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(store, rank, size, options)
    except RuntimeError as error:
        raise TransferError(f"rank {rank} of {size} could not join the group: {_first(error)}") from None


class Transport:
    """Messages by rank of the group. Bytes are counted where they enter and leave."""

    def __init__(self, group: Any, *, rank: int, backend: Backend, device: torch.device) -> None:
        self._group = group
        self.rank = rank
        self.backend = backend
        self.device = device
        """Where messages must lie: the CPU for gloo."""
        self.sent: dict[int, int] = {}
        """Bytes sent to each rank since the last `reset_counters`, everything included."""
        self.received: dict[int, int] = {}

    def reset_counters(self) -> None:
        self.sent, self.received = {}, {}

    def send(self, message: torch.Tensor, to: int, *, tag: int = 0) -> dist.Work:
        """Start to send a contiguous tensor, which must not change until the work is waited for."""
        raw = self._bytes(message)
        self.sent[to] = self.sent.get(to, 0) + raw.nbytes
        try:
            return self._group.send([raw], to, tag)
        except RuntimeError as error:
            raise _explained(f"cannot send to rank {to}", error) from None

    def receive(self, into: torch.Tensor, source: int, *, tag: int = 0) -> dist.Work:
        """Start to receive into a contiguous tensor of the right size."""
        raw = self._bytes(into)
        self.received[source] = self.received.get(source, 0) + raw.nbytes
        try:
            return self._group.recv([raw], source, tag)
        except RuntimeError as error:
            raise _explained(f"cannot receive from rank {source}", error) from None

    def wait(self, work: dist.Work, *, seconds: float, what: str) -> None:
        """Wait for one message. Raises TransferError after the time, or when the other end is gone."""
        try:
            work.wait(timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError as error:
            raise _explained(what, error) from None

    def close(self) -> None:
        """Leave the group; whoever waits for this rank fails now."""
        self._group = None

    def _bytes(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._group is None:
            raise TransferError("the connection is closed")
        assert tensor.is_contiguous(), "a message is contiguous"
        return flat_bytes(tensor)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as bytes in one dim, shared."""
    return tensor if tensor.dtype == torch.uint8 and tensor.ndim == 1 else tensor.view(-1).view(torch.uint8)


def _explained(what: str, error: RuntimeError) -> TransferError:
    return TransferError(f"{what}: {_first(error)}")


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
