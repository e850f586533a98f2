"""A dense update: every sender packs, casts and sends its lanes, every receiver stages and then applies its own.

Memory beside the tensors themselves: a sender has two buckets, one being packed while the other travels; a
window that is contiguous and of the wire's dtype already is sent from where it lies. A receiver has its staging,
which is as large as the update's share of the rank and lies in the host's memory: a GPU whose free memory is the KV
cache's spares two buckets, through which messages go to the host. When the update is taken it is copied into the live
tensors, or, where a target allows it, takes their place: then their old memory is the staging of the next update.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from titan_bridge.sharding.show import human
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.lanes import Bucket, Message
from titan_bridge.transfer.transport import Transport, flat_bytes

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
    """Sends the messages of one trainer rank, again and again; keeps its two buffers."""

    def __init__(self, transport: Transport, messages: Sequence[Message]) -> None:
        self._transport = transport
        self._messages = messages
        self._ring = _Ring(transport, messages)

    @property
    def buffer_bytes(self) -> int:
        """Memory held beside the tensors: at most two buckets."""
        return self._ring.nbytes

    def send(self, local: Mapping[str, torch.Tensor], deadline: Deadline) -> None:
        """Send this rank's share of `local` (local tensors by name).

        Raises:
            TransferError: A receiver is gone, or the time is over.
        """
        flat: dict[str, torch.Tensor] = {}
        flying: deque[_Flight] = deque()
        for slot, message in zip(itertools.cycle(range(IN_FLIGHT)), self._messages, strict=False):
            if len(flying) == IN_FLIGHT:
                self._land(flying.popleft(), deadline)
            data = self._as_it_lies(message.bucket, local, flat)
            if data is None:
                data = self._packed(message.bucket, local, slot)
            work = self._transport.send(data, message.peer, tag=message.tag)
            flying.append(_Flight(work, message.peer, data))
        for each in flying:
            self._land(each, deadline)

    def _land(self, flight: _Flight, deadline: Deadline) -> None:
        what = f"sending weights to rank {flight.peer}"
        self._transport.wait(flight.work, seconds=deadline.left, what=what)

    def _as_it_lies(
        self, bucket: Bucket, local: Mapping[str, torch.Tensor], flat: dict[str, torch.Tensor]
    ) -> torch.Tensor | None:
        """The message without a copy; `flat` keeps the bytes of tensors for their next ones."""
        name = bucket.slices[0].name
        tensor = local[name]
        if bucket.run is None or tensor.dtype != bucket.dtype or tensor.device != self._transport.device:
            return None
        if name not in flat:
            if not tensor.is_contiguous():
                return None
            flat[name] = flat_bytes(tensor)
        return flat[name][bucket.run]

    def _packed(self, bucket: Bucket, local: Mapping[str, torch.Tensor], slot: int) -> torch.Tensor:
        message = self._ring.of(bucket, slot)
        for part in bucket.slices:
            window = part.of(_contiguous(local[part.name]))
            message[part.at : part.at + part.elements].view(part.window.size).copy_(window)
        if self._transport.backend == "gloo" and message.device.type != "cpu":
            torch.accelerator.synchronize()
        return message


class _Flight(NamedTuple):
    """A message that is under way; keeps its memory until it has landed."""

    work: dist.Work
    peer: int
    data: torch.Tensor


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


class _Ring:
    """Buffers where messages lie for the transport, made when they are needed; each takes the largest one."""

    def __init__(self, transport: Transport, messages: Sequence[Message]) -> None:
        self._device = transport.device
        self._largest = max((message.bucket.nbytes for message in messages), default=0)
        self._buffers: list[torch.Tensor | None] = [None] * IN_FLIGHT

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers if buffer is not None)

    def of(self, bucket: Bucket, slot: int) -> torch.Tensor:
        """Memory for this message, flat."""
        buffer = self._buffers[slot]
        if buffer is None:
            buffer = torch.empty(self._largest, dtype=torch.uint8, device=self._device)
            self._buffers[slot] = buffer
        return buffer[: bucket.nbytes].view(bucket.dtype)


class Staged(NamedTuple):
    """One update that has arrived: buckets to copy, and whole local tensors to take over as they are."""

    buckets: list[tuple[Bucket, torch.Tensor]]
    shadows: dict[str, torch.Tensor]
    """Local tensors by name; whoever takes one over puts another of its size in its place, for the next update."""


class DenseReceiver:
    """Stages the messages of one worker; keeps the staging for the next update unless told otherwise."""

    def __init__(
        self,
        transport: Transport,
        messages: Sequence[Message],
        whole: Mapping[str, torch.Tensor] | None = None,
        memory: Callable[[torch.Tensor, torch.device], torch.Tensor] | None = None,
        *,
        bounce: bool = False,
    ) -> None:
        """
        Args:
            whole: Live local tensors whose memory may be exchanged; they get a shadow where every message lies in it
                as it travels.
            memory: `memory(like, device)` makes a shadow.
            bounce: Let messages arrive in two buckets where the transport wants them, and keep them elsewhere, in the
                host's memory. Always so if the transport wants them on a GPU.
        """
        self._memory = memory
        self._transport = transport
        self._messages = messages
        self._shadowed = _shadowed([message.bucket for message in messages], whole or {})
        self._ring = _Ring(transport, messages) if bounce or transport.device.type != "cpu" else None
        self._buckets: list[torch.Tensor | None] | None = None
        self._shadows: dict[str, torch.Tensor] = {}

    @property
    def staging_bytes(self) -> int:
        """Memory of the staging, now; the host's."""
        parts = [*(self._buckets or ()), *self._shadows.values()]
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def buffer_bytes(self) -> int:
        """Memory beside the staging: two buckets on a GPU, none where messages arrive in the staging."""
        return self._ring.nbytes if self._ring is not None else 0

    def prepare(self) -> None:
        """Make the staging, if it is not there.

        Raises:
            TransferError: There is no memory for it.
        """
        if self._buckets is not None:
            return
        device = torch.device("cpu")
        pin = self._transport.device.type != "cpu"
        try:
            self._shadows = {
                name: torch.empty_like(like, device=device)
                if self._memory is None
                else self._memory(like, device)
                for name, like in self._shadowed.items()
            }
            self._buckets = [
                None
                if message.bucket.slices[0].name in self._shadows
                else torch.empty(message.bucket.elements, dtype=message.bucket.dtype, pin_memory=pin)
                for message in self._messages
            ]
        except (RuntimeError, MemoryError, OSError) as error:
            self.release()
            size = human(sum(message.bucket.nbytes for message in self._messages))
            raise TransferError(
                f"no memory on the host for {size} of new weights beside the live ones: {error}"
            ) from None

    def receive(self, deadline: Deadline) -> Staged:
        """All of one update, after `prepare`.

        Raises:
            TransferError: A sender is gone, or the time is over. Nothing live was touched.
        """
        assert self._buckets is not None, "prepare() comes first"
        shadows = {name: flat_bytes(shadow) for name, shadow in self._shadows.items()}
        places = [
            flat_bytes(own) if own is not None else shadows[message.bucket.slices[0].name][message.bucket.run]
            for message, own in zip(self._messages, self._buckets, strict=True)
        ]
        try:
            if self._ring is None:
                self._receive_in_place(places, deadline)
            else:
                self._receive_through(self._ring, places, deadline)
        except TransferError:
            self.release()  # late bytes may still arrive there
            raise
        buckets = [
            (message.bucket, own)
            for message, own in zip(self._messages, self._buckets, strict=True)
            if own is not None
        ]
        return Staged(buckets, self._shadows)

    def _receive_in_place(self, places: Sequence[torch.Tensor], deadline: Deadline) -> None:
        works = [
            self._transport.receive(place, message.peer, tag=message.tag)
            for message, place in zip(self._messages, places, strict=True)
        ]
        # The last ones first: when they are there, so are most others, which then wake nobody.
        for work, message in zip(reversed(works), reversed(self._messages), strict=True):
            self._wait(work, message, deadline)

    def _receive_through(self, ring: _Ring, places: Sequence[torch.Tensor], deadline: Deadline) -> None:
        flying: deque[tuple[dist.Work, Message, torch.Tensor, torch.Tensor]] = deque()

        def unload() -> None:
            work, message, data, place = flying.popleft()
            self._wait(work, message, deadline)
            # The next message into this buffer comes after the copy in the stream.
            place.copy_(data, non_blocking=True)

        slots = itertools.cycle(range(IN_FLIGHT))
        for slot, message, place in zip(slots, self._messages, places, strict=False):
            if len(flying) == IN_FLIGHT:
                unload()
            data = flat_bytes(ring.of(message.bucket, slot))
            flying.append(
                (self._transport.receive(data, message.peer, tag=message.tag), message, data, place)
            )
        while flying:
            unload()
        if self._transport.device.type != "cpu":
            torch.accelerator.current_stream(self._transport.device).synchronize()

    def _wait(self, work: dist.Work, message: Message, deadline: Deadline) -> None:
        what = f"receiving weights from rank {message.peer}"
        self._transport.wait(work, seconds=deadline.left, what=what)

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
            if bucket.run is None or bucket.dtype != meta.dtype:
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
