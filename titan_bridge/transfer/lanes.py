"""What one rank sends to, or receives from, each other rank in a dense update: the plan cut into buckets.

Both ends cut the same copies in the same order, so a bucket needs no header: not a byte travels that is not
weight. A bucket holds elements of one dtype, that of the destination; copies larger than a bucket are cut along
their outer dims.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from titan_bridge.sharding.layout import itemsize
from titan_bridge.sharding.moves import Window
from titan_bridge.sharding.plan import Plan

BUCKET_BYTES = 64 * 2**20
ALONE_BYTES = 2**19
"""A copy of this size, or of a quarter of a bucket, is a message of its own: where it is contiguous, it then leaves
and arrives where it belongs, without being packed."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A window of this rank's local tensor `name`, laid flat at `[at, at + elements)` of its bucket."""

    name: str
    window: Window
    at: int
    elements: int

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """The window of the (contiguous) local tensor."""
        return self.window.of(local)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One message of a dense update."""

    dtype: torch.dtype
    slices: tuple[Slice, ...]

    @property
    def elements(self) -> int:
        last = self.slices[-1]
        return last.at + last.elements

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @cached_property
    def run(self) -> slice | None:
        """Which bytes of a local tensor, if it has this dtype, are the message as it travels; None if it is packed."""
        window = self.slices[0].window
        if len(self.slices) > 1 or not window.is_run:
            return None
        start = window.offset * self.dtype.itemsize
        return slice(start, start + self.nbytes)


@dataclass(frozen=True, kw_only=True)
class Lane:
    """All messages between this rank and `peer`, in order."""

    peer: int
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, kw_only=True)
class Message:
    """A bucket on its way."""

    peer: int
    tag: int
    bucket: Bucket


def in_turn(lanes: Sequence[Lane], *, rank: int, trainers: int, workers: int) -> tuple[Message, ...]:
    """All messages of one rank in the order of one list that all ranks share.

    Two ranks may then have as few messages under way as they like and never wait for each other in a circle: the first
    message of the list that has not arrived is the next of both its ends. And one message a peer in turn, each trainer
    beginning with another worker, so that they do not all send to the same one.

    Args:
        rank: In the group: `trainers` come first, then `workers`.
    """

    def place(message: Message) -> tuple[int, int, int]:
        trainer, worker = sorted((rank, message.peer))
        return message.tag, (worker - trainers - trainer) % workers, trainer

    messages = (
        Message(peer=lane.peer, tag=tag, bucket=bucket)
        for lane in lanes
        for tag, bucket in enumerate(lane.buckets)
    )
    return tuple(sorted(messages, key=place))


def lanes(
    plan: Plan,
    dtypes: Mapping[str, str],
    *,
    sender: int | None = None,
    receiver: int | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> tuple[Lane, ...]:
    """The lanes out of `sender`, or into `receiver` (give one), by peer.

    Args:
        plan: Of the connection; its ranks are those of the group, and no rank is on both sides.
        dtypes: Wire dtype by destination name.
        bucket_bytes: Most bytes of one message; at least one element travels in each.
    """
    assert (sender is None) != (receiver is None), "one end"
    found: dict[int, dict[str, list[tuple[str, Window, int]]]] = {}
    for copy in plan.copies(source=sender, destination=receiver):
        dtype = dtypes[copy.destination_name]
        most = max(1, bucket_bytes // itemsize(dtype))
        if receiver is None:
            peer, name, window = copy.destination, copy.source_name, copy.source_window
        else:
            peer, name, window = copy.source, copy.destination_name, copy.destination_window
        assert isinstance(peer, int)
        parts = found.setdefault(peer, {}).setdefault(dtype, [])
        parts += [(name, part, math.prod(part.size)) for part in cut(window, most)]
    result = []
    for peer in sorted(found):
        buckets: list[Bucket] = []
        for dtype, parts in found[peer].items():
            buckets += _packed(parts, dtype, max(1, bucket_bytes // itemsize(dtype)))
        result.append(Lane(peer=peer, buckets=tuple(buckets)))
    return tuple(result)


def cut(window: Window, most: int) -> Iterator[Window]:
    """The window in row-major order, in parts of at most `most` elements; depends on its size only."""
    elements = math.prod(window.size)
    if elements <= most:
        if elements:
            yield window
        return
    dim = next(d for d, size in enumerate(window.size) if size > 1)
    inner = elements // window.size[dim]
    rows = max(1, most // inner)
    for first in range(0, window.size[dim], rows):
        count = min(rows, window.size[dim] - first)
        part = Window(
            size=(*window.size[:dim], count, *window.size[dim + 1 :]),
            stride=window.stride,
            offset=window.offset + first * window.stride[dim],
        )
        yield from cut(part, most)


def _packed(parts: list[tuple[str, Window, int]], dtype: str, most: int) -> Iterator[Bucket]:
    torch_dtype = getattr(torch, dtype)
    alone = max(1, min(ALONE_BYTES // torch_dtype.itemsize, most // 4))
    slices: list[Slice] = []
    at = 0
    for name, window, elements in parts:
        if elements >= alone:
            only = Slice(name=name, window=window, at=0, elements=elements)
            yield Bucket(dtype=torch_dtype, slices=(only,))
            continue
        if slices and at + elements > most:
            yield Bucket(dtype=torch_dtype, slices=tuple(slices))
            slices, at = [], 0
        slices.append(Slice(name=name, window=window, at=at, elements=elements))
        at += elements
    if slices:
        yield Bucket(dtype=torch_dtype, slices=tuple(slices))
