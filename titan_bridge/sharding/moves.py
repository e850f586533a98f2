"""Copies, and how a group of tensors that look alike is written out as copies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from titan_bridge.sharding.boxes import Box
from titan_bridge.sharding.holders import BoxHolders, Holder
from titan_bridge.sharding.match import Item
from titan_bridge.sharding.overlap import Geometry
from titan_bridge.sharding.sides import ChunkSide, MeshSide


@dataclass(frozen=True, kw_only=True)
class Window:
    """A strided window of a contiguous local tensor, in elements: `local.as_strided(size, stride,
    offset)`."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """From the first element of the local tensor; add its own `storage_offset()` if it has one."""

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """The window of a contiguous tensor, sharing its memory."""
        return local.as_strided(self.size, self.stride, local.storage_offset() + self.offset)

    @property
    def is_run(self) -> bool:
        """Whether it is one run of the tensor's elements, in their order."""
        return row_major(self.size, self.stride)


def row_major(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements of these sizes and strides lie one after the other, as in a contiguous tensor."""
    step = 1
    for n, s in zip(reversed(size), reversed(stride), strict=True):
        if n != 1:
            if s != step:
                return False
            step *= n
    return True


@dataclass(frozen=True, kw_only=True)
class Copy:
    """One copy: `destination_window.of(destination_local).copy_(source_window.of(source_local))`.

    Both windows have the same size, dim for dim.
    """

    source: Holder
    destination: Holder
    source_name: str
    destination_name: str
    source_chunk: int | None
    """Index into `BoxHolders.chunks` when the source was given as chunks; None when it is a rank's local
    tensor."""
    destination_chunk: int | None
    box: Box
    """In global coordinates: of the tensor itself, or of the view's factored and sliced dims."""
    source_window: Window
    destination_window: Window

    @property
    def elements(self) -> int:
        return self.box.numel


@dataclass(frozen=True)
class Group:
    """Tensors that differ in name and holders only.

    `choice[pair, destination replica, tensor]` says which replica of the source sends.
    """

    geometry: Geometry
    items: tuple[Item, ...]
    itemsize: int
    """Bytes an element on the wire."""
    sources: np.ndarray
    """[tensors, slots] -> index into the holders of the plan."""
    destinations: np.ndarray
    choice: np.ndarray
    local: np.ndarray
    """Same shape; True where the destination has the data itself."""


def ends(group: Group, tensors: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Holders that send and receive, each [pairs, destination replicas, tensors]; the latter -1 where there
    is none."""
    geometry = group.geometry
    choice = group.choice[:, :, tensors]
    source_slot = geometry.source_slots[geometry.pair_source[:, None, None], choice]
    slot = geometry.destination_slots[geometry.pair_destination][:, :, None]
    tensor = np.arange(len(group.items))[tensors]
    source = group.sources[tensor, source_slot]
    return source, np.where(slot < 0, -1, group.destinations[tensor, slot])


def copies_of(
    group: Group, holders: Sequence[Holder], source: int | None, destination: int | None
) -> Iterator[Copy]:
    """The copies of a group, all or those from or to one holder (an index into `holders`)."""
    geometry = group.geometry
    senders, receivers = ends(group)
    wanted = receivers >= 0
    if source is not None:
        wanted &= senders == source
    if destination is not None:
        wanted &= receivers == destination
    if not wanted.any():
        return
    view = _Windows(geometry)
    source_in_chunks = isinstance(group.items[0].source.by, BoxHolders)
    destination_in_chunks = isinstance(group.items[0].destination.by, BoxHolders)
    for tensor, pair, replica in zip(*np.nonzero(wanted.transpose(2, 0, 1)), strict=True):
        item = group.items[tensor]
        chosen = group.choice[pair, replica, tensor]
        source_slot = int(geometry.source_slots[geometry.pair_source[pair], chosen])
        destination_slot = int(geometry.destination_slots[geometry.pair_destination[pair], replica])
        for row in geometry.row_order[geometry.pair_first[pair] : geometry.pair_first[pair + 1]]:
            box, source_window, destination_window = view.of(int(row), source_slot, destination_slot)
            yield Copy(
                source=holders[senders[pair, replica, tensor]],
                destination=holders[receivers[pair, replica, tensor]],
                source_name=item.source.name,
                destination_name=item.destination.name,
                source_chunk=source_slot if source_in_chunks else None,
                destination_chunk=destination_slot if destination_in_chunks else None,
                box=box,
                source_window=source_window,
                destination_window=destination_window,
            )


class _Windows:
    """Boxes of a geometry as windows of local tensors; remembers what several copies have in common."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._steps: dict[tuple[bool, int], tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._known: dict[tuple[int, int, int], tuple[Box, Window, Window]] = {}

    def of(self, row: int, source_slot: int, destination_slot: int) -> tuple[Box, Window, Window]:
        """(box in cells, window of the source, window of the destination)."""
        key = (row, source_slot, destination_slot)
        if key not in self._known:
            start, stop, source_delta, destination_delta = self._geometry.row(row)
            box = Box(start=start, stop=stop)
            self._known[key] = (
                box,
                self._window(self._geometry.source, source_slot, box, source_delta),
                self._window(self._geometry.destination, destination_slot, box, destination_delta),
            )
        return self._known[key]

    def _window(self, side: MeshSide | ChunkSide, slot: int, box: Box, delta: tuple[int, ...]) -> Window:
        key = (side is self._geometry.source, slot)
        if key not in self._steps:
            shape = side.local_shape(slot)
            contiguous = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
            self._steps[key] = (contiguous, side.origin(slot))
        dim_stride, origin = self._steps[key]
        stride, offset = [0] * box.ndim, 0
        for d, frame in enumerate(side.frame):
            position = delta[d] - origin[d]
            for cell, low, step in zip(frame.cells, frame.offset, frame.strides, strict=True):
                stride[cell] = step * dim_stride[d]
                position += (box.start[cell] + low) * step
            offset += position * dim_stride[d]
        return Window(size=box.shape, stride=tuple(stride), offset=offset)
