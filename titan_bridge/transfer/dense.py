"""A dense update: every sender packs, casts and sends its lanes, every receiver stages and then applies its own.

Memory beside the tensors themselves: a sender has two buckets, one being packed while the other travels; a
window that is contiguous and of the wire's dtype already is sent from where it lies. A receiver has its staging,
which is as large as the update's share of the rank. When the update is taken it is copied into the live tensors, or,
where a target allows it, takes their place: then their old memory is the staging of the next update.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.lanes import Bucket, Lane
from titan_bridge.transfer.transport import Transport

IN_FLIGHT = 2
"""Buckets of a sender that are packed or travel at a time."""


class Deadline:
    """A point in time up to which something may take."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; at least a little, so that what is there already is still taken."""
        return max(self._at - time.monotonic(), 0.001)

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._at


class DenseSender:
    """Sends the lanes of one trainer rank, again and again; keeps its two buffers."""

    def __init__(self, transport: Transport, lanes: Sequence[Lane]) -> None:
        self._transport = transport
        self._order = _rotated(lanes, transport.rank)
        self._buffers: list[torch.Tensor | None] = [None] * IN_FLIGHT
        self._largest = max((bucket.nbytes for lane in lanes for bucket in lane.buckets), default=0)

    @property
    def buffer_bytes(self) -> int:
        """Memory held beside the tensors: at most two buckets."""
        return sum(buffer.nbytes for buffer in self._buffers if buffer is not None)

    def send(self, local: Mapping[str, torch.Tensor], deadline: Deadline) -> None:
        """Send this rank's share of `local` (local tensors by name).

        Raises:
            TransferError: A receiver is gone, or the time is over.
        """
        flying: list[tuple[dist.Work, int, torch.Tensor] | None] = [None] * IN_FLIGHT
        for slot, (peer, tag, bucket) in zip(itertools.cycle(range(IN_FLIGHT)), self._order, strict=False):
            self._land(flying[slot], deadline)
            message = self._message(bucket, local, slot)
            flying[slot] = (self._transport.send(message, peer, tag=tag), peer, message)
        for each in flying:
            self._land(each, deadline)

    def _land(self, flight: tuple[dist.Work, int, torch.Tensor] | None, deadline: Deadline) -> None:
        """Wait for a message that is under way; it keeps its memory until then."""
        if flight is not None:
            work, peer, _ = flight
            self._transport.wait(work, seconds=deadline.left, what=f"sending weights to rank {peer}")

    def _message(self, bucket: Bucket, local: Mapping[str, torch.Tensor], slot: int) -> torch.Tensor:
        if len(bucket.slices) == 1:
            only = bucket.slices[0].of(_contiguous(local[bucket.slices[0].name]))
            if only.dtype == bucket.dtype and only.is_contiguous() and only.device == self._transport.device:
                return only.view(-1)
        buffer = self._buffers[slot]
        if buffer is None:
            buffer = torch.empty(self._largest, dtype=torch.uint8, device=self._transport.device)
            self._buffers[slot] = buffer
        message = buffer[: bucket.nbytes].view(bucket.dtype)
        for part in bucket.slices:
            window = part.of(_contiguous(local[part.name]))
            message[part.at : part.at + part.elements].view(part.window.size).copy_(window)
        if self._transport.backend == "gloo" and message.device.type != "cpu":
            torch.accelerator.synchronize()
        return message


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _rotated(lanes: Sequence[Lane], rank: int) -> list[tuple[int, int, Bucket]]:
    """(peer, tag, bucket): one bucket a peer in turn, each sender beginning with another peer."""
    first = rank % len(lanes) if lanes else 0
    turned = [*lanes[first:], *lanes[:first]]
    longest = max((len(lane.buckets) for lane in lanes), default=0)
    return [
        (lane.peer, tag, lane.buckets[tag])
        for tag in range(longest)
        for lane in turned
        if tag < len(lane.buckets)
    ]


class Staged(NamedTuple):
    """One update that has arrived: buckets to copy, and whole local tensors to take over as they are."""

    buckets: list[tuple[Bucket, torch.Tensor]]
    shadows: dict[str, torch.Tensor]
    """Local tensors by name; whoever takes one over puts another of its size in its place, for the next update."""


class DenseReceiver:
    """Stages the lanes of one worker; keeps the staging for the next update unless told otherwise."""

    def __init__(
        self,
        transport: Transport,
        lanes: Sequence[Lane],
        whole: Mapping[str, torch.Tensor] | None = None,
        memory: Callable[[torch.Tensor, torch.device], torch.Tensor] | None = None,
    ) -> None:
        """`whole`: live local tensors whose memory may be exchanged; they get a shadow where every message lies in it
        as it travels. `memory(like, device)` makes one."""
        self._memory = memory
        self._transport = transport
        self._order = [(lane.peer, tag, bucket) for lane in lanes for tag, bucket in enumerate(lane.buckets)]
        self._shadowed = _shadowed([bucket for _, _, bucket in self._order], whole or {})
        self._buckets: list[torch.Tensor | None] | None = None
        self._shadows: dict[str, torch.Tensor] = {}

    @property
    def staging_bytes(self) -> int:
        """Memory of the staging, now."""
        parts = [*(self._buckets or ()), *self._shadows.values()]
        return sum(part.nbytes for part in parts if part is not None)

    def receive(self, deadline: Deadline) -> Staged:
        """All of one update.

        Raises:
            TransferError: A sender is gone, or the time is over. Nothing live was touched.
        """
        if self._buckets is None:
            self._allocate()
        assert self._buckets is not None
        places = [
            self._in_shadow(bucket) if own is None else own
            for (_, _, bucket), own in zip(self._order, self._buckets, strict=True)
        ]
        works = [
            (peer, self._transport.receive(data, peer, tag=tag))
            for (peer, tag, _), data in zip(self._order, places, strict=True)
        ]
        try:
            for peer, work in works:
                self._transport.wait(work, seconds=deadline.left, what=f"receiving weights from rank {peer}")
        except TransferError:
            self.release()  # late bytes may still arrive there
            raise
        buckets = [
            (bucket, own)
            for (_, _, bucket), own in zip(self._order, self._buckets, strict=True)
            if own is not None
        ]
        return Staged(buckets, self._shadows)

    def _allocate(self) -> None:
        device = self._transport.device
        self._shadows = {
            name: torch.empty_like(like, device=device)
            if self._memory is None
            else self._memory(like, device)
            for name, like in self._shadowed.items()
        }
        self._buckets = [
            None
            if bucket.slices[0].name in self._shadows
            else torch.empty(bucket.elements, dtype=bucket.dtype, device=device)
            for _, _, bucket in self._order
        ]

    def _in_shadow(self, bucket: Bucket) -> torch.Tensor:
        (only,) = bucket.slices
        return only.of(self._shadows[only.name]).view(-1)

    def release(self) -> None:
        """Give the staging back."""
        self._buckets, self._shadows = None, {}


def _shadowed(buckets: Sequence[Bucket], whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of `whole`, as meta tensors, of which every element comes in a message that is laid out like them."""
    metas = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in whole.items()}
    arriving = dict.fromkeys(metas, 0)
    for bucket in buckets:
        for part in bucket.slices:
            meta = metas.get(part.name)
            if meta is None:
                continue
            if len(bucket.slices) > 1 or bucket.dtype != meta.dtype or not part.of(meta).is_contiguous():
                del metas[part.name]
            else:
                arriving[part.name] += part.elements
    return {name: meta for name, meta in metas.items() if arriving[name] == meta.numel()}


def apply_dense(staged: Staged, live: Mapping[str, torch.Tensor]) -> set[str]:
    """Copy staged buckets into the live local tensors; returns the names that were written."""
    for bucket, data in staged.buckets:
        for part in bucket.slices:
            part.of(live[part.name]).copy_(data[part.at : part.at + part.elements].view(part.window.size))
    return {part.name for bucket, _ in staged.buckets for part in bucket.slices}
