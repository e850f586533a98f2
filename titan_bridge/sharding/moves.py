"""Copies, and how a group of tensors that look alike is written out as copies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from titan_bridge.sharding.boxes import Box, contiguous_stride
from titan_bridge.sharding.match import Item
from titan_bridge.sharding.sides import Geometry, Side
from titan_bridge.sharding.tensors import Owner


@dataclass(frozen=True, kw_only=True)
class Window:
    """A strided window of a contiguous local tensor, in elements: `local.as_strided(size, stride, offset)`."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # from the first element of the local tensor; add its own `storage_offset()` if it has one

    @classmethod
    def of_box(cls, box: Box, shape: Sequence[int]) -> Window:
        """A box of a contiguous tensor of `shape`."""
        stride = contiguous_stride(shape)
        offset = sum(a * step for a, step in zip(box.start, stride, strict=True))
        return cls(size=box.shape, stride=stride, offset=offset)

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """The window of a contiguous tensor, sharing its memory."""
        return local.as_strided(self.size, self.stride, local.storage_offset() + self.offset)

    @property
    def is_run(self) -> bool:
        """Whether it is one run of the tensor's elements, in their order."""
        return row_major(self.size, self.stride)

    @property
    def order(self) -> list[int]:
        """The dims of more than one element, the outermost in memory first."""
        return sorted((d for d, n in enumerate(self.size) if n > 1), key=lambda d: -self.stride[d])

    def at(self, index: Sequence[slice]) -> Window:
        """A part of the window, from one slice (start, stop) for each dim."""
        offset = self.offset + sum(part.start * step for part, step in zip(index, self.stride, strict=True))
        return Window(size=tuple(p.stop - p.start for p in index), stride=self.stride, offset=offset)


def row_major(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements of these sizes and strides lie one after the other, as in a contiguous tensor."""
    step = 1
    for n, s in zip(reversed(size), reversed(stride), strict=True):
        if n != 1:
            if s != step:
                return False
            step *= n
    return True


def cut(
    size: Sequence[int], order: Sequence[int], most: int, stride: Sequence[int] | None = None
) -> Iterator[tuple[slice, ...]]:
    """The parts of an array of `size`, of at most `most` elements each (but one at least), as slices for every dim.
    It is cut along the dims in `order` and told in that order. With `stride`, what lies between the elements of a part
    counts, too; `order` is then that of a window."""
    if 0 in size:
        return
    step = list(size)
    for dim in order:
        rest = math.prod(step) // step[dim] if stride is None else stride[dim]
        step[dim] = max(1, min(step[dim], most // rest))
        if rest <= most:
            break
    for starts in itertools.product(*(range(0, size[dim], step[dim]) for dim in order)):
        first = [0] * len(size)
        for dim, start in zip(order, starts, strict=True):
            first[dim] = start
        yield tuple(slice(a, min(a + n, whole)) for a, n, whole in zip(first, step, size, strict=True))


@dataclass(frozen=True, kw_only=True)
class Copy:
    """One copy: `destination_window.of(destination_local).copy_(source_window.of(source_local))`.
    Both windows have the same size, dim for dim."""

    source: Owner
    destination: Owner
    source_name: str
    destination_name: str
    source_chunk: int | None
    """Index into the tensor's `chunks`; None when it is a rank's local tensor on a mesh."""
    destination_chunk: int | None
    box: Box  # in global coordinates: of the tensor itself, or of the view's factored and sliced dims
    source_window: Window
    destination_window: Window

    @property
    def elements(self) -> int:
        return self.box.numel


@dataclass(frozen=True)
class Group:
    """Tensors that differ in name and owners only.
    `choice[pair, destination replica, tensor]` says which replica of the source sends."""

    geometry: Geometry
    items: tuple[Item, ...]
    itemsize: int  # bytes an element on the wire
    sources: np.ndarray  # [tensors, slots] -> index into the owners of the plan
    destinations: np.ndarray
    choice: np.ndarray
    local: np.ndarray  # same shape; True where the destination has the data itself


def ends(group: Group, tensors: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Owners that send and receive, each [pairs, destination replicas, tensors]; the latter -1 where there is none."""
    geometry = group.geometry
    choice = group.choice[:, :, tensors]
    source_slot = geometry.source.slots[geometry.pair_source[:, None, None], choice]
    slot = geometry.destination.slots[geometry.pair_destination][:, :, None]
    tensor = np.arange(len(group.items))[tensors]
    source = group.sources[tensor, source_slot]
    return source, np.where(slot < 0, -1, group.destinations[tensor, slot])


def copies_of(
    group: Group, owners: Sequence[Owner], source: int | None, destination: int | None
) -> Iterator[Copy]:
    """The copies of a group, all or those from or to one owner (an index into `owners`)."""
    geometry = group.geometry
    senders, receivers = ends(group)
    wanted = receivers >= 0
    if source is not None:
        wanted &= senders == source
    if destination is not None:
        wanted &= receivers == destination
    if not wanted.any():
        return
    windows = _windows(geometry)
    in_chunks = [side.on is None for side in (group.items[0].source, group.items[0].destination)]
    for tensor, pair, replica in zip(*np.nonzero(wanted.transpose(2, 0, 1)), strict=True):
        item = group.items[tensor]
        chosen = group.choice[pair, replica, tensor]
        slots = (
            int(geometry.source.slots[geometry.pair_source[pair], chosen]),
            int(geometry.destination.slots[geometry.pair_destination[pair], replica]),
        )
        for row in range(geometry.pair_first[pair], geometry.pair_first[pair + 1]):
            box, source_window, destination_window = windows(row, *slots)
            yield Copy(
                source=owners[senders[pair, replica, tensor]],
                destination=owners[receivers[pair, replica, tensor]],
                source_name=item.source.name,
                destination_name=item.destination.name,
                source_chunk=slots[0] if in_chunks[0] else None,
                destination_chunk=slots[1] if in_chunks[1] else None,
                box=box,
                source_window=source_window,
                destination_window=destination_window,
            )


def _windows(geometry: Geometry) -> Callable[[int, int, int], tuple[Box, Window, Window]]:
    """(row, source slot, destination slot) -> a box in cells, and it as windows of both local tensors.
    What several copies have in common is computed once."""

    @cache
    def local(side: Side, slot: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shape, origin = side.local(slot)
        return contiguous_stride(shape), origin

    def window(side: Side, slot: int, box: Box, deltas: list[int]) -> Window:
        dim_stride, origin = local(side, slot)
        stride, offset = [0] * box.ndim, 0
        for d, frame in enumerate(side.frame):
            position = deltas[d] - origin[d]
            steps = contiguous_stride(frame.factors)
            for cell, low, step in zip(frame.cells, frame.offset, steps, strict=True):
                stride[cell] = step * dim_stride[d]
                position += (box.start[cell] + low) * step
            offset += position * dim_stride[d]
        return Window(size=box.shape, stride=tuple(stride), offset=offset)

    @cache
    def windows(row: int, source_slot: int, destination_slot: int) -> tuple[Box, Window, Window]:
        box = Box(start=tuple(geometry.start[row].tolist()), stop=tuple(geometry.stop[row].tolist()))
        source = window(geometry.source, source_slot, box, geometry.source_delta[row].tolist())
        deltas = geometry.destination_delta[row].tolist()
        return box, source, window(geometry.destination, destination_slot, box, deltas)

    return windows
