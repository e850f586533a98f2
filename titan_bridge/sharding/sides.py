"""The two sides of a copy in the coordinates that they share, and what they have in common.

Source and destination may see a tensor with different dims (a view). Both describe it by *cells*: the dims of
the view after factoring and slicing. A tensor dim of either side is a row-major run of cells, so an interval
of it is a few boxes of cells, and the place of a cell in a local tensor stays linear:

    position in the local dim = delta + sum over its cells of (cell + offset) * stride

Shards are numbered without replicas: a shard is a distinct part of the tensor, and `slots[shard]` are those
that have it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from titan_bridge.sharding import dtensor
from titan_bridge.sharding.boxes import Box, axes_of, factored, local_shape_of, meeting, segments_of
from titan_bridge.sharding.tensors import TensorMetadata
from titan_bridge.sharding.view import View


@dataclass(frozen=True)
class DimFrame:
    """How one tensor dim is made of cells, row-major."""

    cells: tuple[int, ...]
    factors: tuple[int, ...]  # full size of each cell dim in this tensor
    offset: tuple[int, ...]  # where cell 0 lies in each factor
    limit: tuple[int, ...]  # number of cells in each

    def boxes(self, start: int, stop: int) -> Iterator[tuple[tuple[int, int], ...]]:
        """The interval of the tensor dim as boxes of cells: one (first, last) for each cell dim."""
        if not self.cells:
            if start < stop:
                yield ()
            return
        for part in factored(start, stop, self.factors):
            spans = zip(part, self.offset, self.limit, strict=True)
            box = tuple((max(a - low, 0), min(b - low, size)) for (a, b), low, size in spans)
            if all(a < b for a, b in box):
                yield box


Frame = tuple[DimFrame, ...]


def identity_frame(shape: Sequence[int]) -> Frame:
    """Every dim is its own cell dim."""
    return tuple(DimFrame((d,), (size,), (0,), (size,)) for d, size in enumerate(shape))


def titan_frame(view: View) -> Frame:
    """The TorchTitan tensor of a view."""
    frame, count = [], itertools.count()
    for factors in view.factors:
        cells = tuple(next(count) for _ in factors)
        starts, limits = tuple(view.index[c][0] for c in cells), tuple(view.index_shape[c] for c in cells)
        frame.append(DimFrame(cells, factors, starts, limits))
    return tuple(frame)


def external_frame(view: View) -> Frame:
    """The external tensor of a view; cells of size 1 need no place in it."""
    sizes = [tuple(view.index_shape[c] for c in group) for group in view.groups]
    dims = zip(view.groups, sizes, strict=True)
    return tuple(DimFrame(group, size, (0,) * len(group), size) for group, size in dims)


@dataclass(frozen=True, eq=False)
class Side:
    """A tensor on one side, as boxes of cells. Arrays of int64; the first four have one row a box."""

    frame: Frame
    shard: np.ndarray  # [boxes] the shard that has the box
    start: np.ndarray
    stop: np.ndarray  # [boxes, cells]
    delta: np.ndarray  # [boxes, tensor dims] (zero for chunks: theirs is minus the start of the chunk)
    slots: np.ndarray
    """[shards, replicas]: positions on the mesh, or indices of chunks, -1 where a shard has fewer replicas."""
    tensor: TensorMetadata

    def local(self, slot: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape of the local tensor in a slot, and what to subtract from positions beside the delta of the box."""
        tensor = self.tensor
        if tensor.on is None:
            box = tensor.chunks[slot].box
            return box.shape, box.start
        mesh = tensor.on.mesh.shape
        coordinate = tuple(int(c) for c in np.unravel_index(slot, mesh))
        return local_shape_of(tensor.on.placements, tensor.shape, mesh, coordinate), (0,) * len(tensor.shape)


def side_of(tensor: TensorMetadata, frame: Frame, sizes: Sequence[int], *, source: bool) -> Side:
    """A tensor in the cells of `frame`, which have these sizes. The shards of a source are disjoint.
    On a mesh, shards are a product over the dims, because a mesh axis shards one dim at most."""
    if (on := tensor.on) is None:
        return _chunk_side(tensor, frame, sizes, disjoint=source)
    mesh, axes = on.mesh.shape, [axes_of(on.placements, d) for d in range(len(tensor.shape))]
    cuts = [tuple((on.placements[a], mesh[a]) for a in own) for own in axes]
    parts = [_dim_boxes(*dim) for dim in zip(tensor.shape, cuts, frame, strict=True)]
    counts = [len(own) for own, *_ in parts]
    rows = np.indices(counts).reshape(len(parts), math.prod(counts))
    shard = np.zeros(rows.shape[1], dtype=np.int64)
    # Cell dims of size 1 that this side does not have keep [0, size).
    start = np.zeros((len(shard), len(sizes)), dtype=np.int64)
    stop = np.broadcast_to(np.asarray(sizes, dtype=np.int64), start.shape).copy()
    delta = np.zeros((len(shard), len(parts)), dtype=np.int64)
    for d, (part, row) in enumerate(zip(parts, rows, strict=True)):
        own, first, last, delta[:, d] = (array[row] for array in part)
        shard = shard * math.prod(mesh[a] for a in axes[d]) + own
        start[:, frame[d].cells], stop[:, frame[d].cells] = first, last
    order = [a for own in axes for a in own]
    shards = math.prod(mesh[a] for a in order)
    order += [a for a in range(len(mesh)) if a not in order]
    slots = np.arange(math.prod(mesh), dtype=np.int64).reshape(mesh).transpose(order).reshape(shards, -1)
    return Side(frame, shard, start, stop, delta, slots, tensor)


def _chunk_side(tensor: TensorMetadata, frame: Frame, sizes: Sequence[int], *, disjoint: bool) -> Side:
    """Every distinct box is a shard.
    As a source, chunks that overlap are cut so that shards are disjoint; a shard's slots are all chunks that contain
    it. A destination has to be written in full, overlaps and all."""
    slots_of: dict[Box, list[int]] = {}
    for slot, chunk in enumerate(tensor.chunks):
        slots_of.setdefault(chunk.box, []).append(slot)
    shards = [([box], slots) for box, slots in slots_of.items() if box.numel]
    if disjoint and len(shards) > 1:
        start, stop = (
            np.array([getattr(boxes[0], end) for boxes, _ in shards], dtype=np.int64).reshape(len(shards), -1)
            for end in ("start", "stop")
        )
        if len(meeting((start, stop), (start, stop))[0]) > len(shards):
            shards = _atoms(shards)
    shard, first_cells, last_cells = [], [], []
    for index, (boxes, _) in enumerate(shards):
        for box in boxes:
            dims = [list(dim.boxes(*ends)) for dim, *ends in zip(frame, box.start, box.stop, strict=True)]
            for parts in itertools.product(*dims):
                first, last = [0] * len(sizes), list(sizes)
                for dim, part in zip(frame, parts, strict=True):
                    for cell, (a, b) in zip(dim.cells, part, strict=True):
                        first[cell], last[cell] = a, b
                shard.append(index)
                first_cells.append(first)
                last_cells.append(last)
    width = max((len(slots) for _, slots in shards), default=0)
    padded = [slots + [-1] * (width - len(slots)) for _, slots in shards]
    return Side(
        frame,
        np.array(shard, dtype=np.int64),
        np.array(first_cells, dtype=np.int64).reshape(len(shard), len(sizes)),
        np.array(last_cells, dtype=np.int64).reshape(len(shard), len(sizes)),
        np.zeros((len(shard), len(frame)), dtype=np.int64),
        np.array(padded, dtype=np.int64).reshape(len(shards), width),
        tensor,
    )


@lru_cache(maxsize=4096)
def _dim_boxes(
    size: int, cuts: tuple[tuple[dtensor.Placement, int], ...], frame: DimFrame
) -> tuple[np.ndarray, ...]:
    """The boxes of one tensor dim over all its shards: `shard`, `start`, `stop` and `delta` of a `Side`."""
    shard, start, stop, delta = [], [], [], []
    for index, coordinate in enumerate(itertools.product(*(range(chunks) for _, chunks in cuts))):
        for a, b, local in segments_of(size, [(*cut, at) for cut, at in zip(cuts, coordinate, strict=True)]):
            for box in frame.boxes(a, b):
                shard.append(index)
                start.append([first for first, _ in box])
                stop.append([last for _, last in box])
                delta.append(local - a)
    shape = (len(shard), len(frame.cells))
    start, stop = (np.array(ends, dtype=np.int64).reshape(shape) for ends in (start, stop))
    return np.array(shard, dtype=np.int64), start, stop, np.array(delta, dtype=np.int64)


def _atoms(shards: list[tuple[list[Box], list[int]]]) -> list[tuple[list[Box], list[int]]]:
    """Overlapping boxes cut along every border that any of them has, and put together by who has them."""
    ndim = shards[0][0][0].ndim
    borders = [
        sorted({at for (box,), _ in shards for at in (box.start[d], box.stop[d])}) for d in range(ndim)
    ]
    result: dict[tuple[int, ...], list[Box]] = {}
    for corner in itertools.product(*(itertools.pairwise(line) for line in borders)):
        atom = Box(start=tuple(a for a, _ in corner), stop=tuple(b for _, b in corner))
        slots = tuple(sorted(slot for (box,), own in shards if box.contains(atom) for slot in own))
        if slots:
            result.setdefault(slots, []).append(atom)
    return [(boxes, list(slots)) for slots, boxes in result.items()]


class Geometry:
    """All boxes that the two sides of one kind of tensor have in common, one row each, by destination and source shard.

    Attributes:
        start, stop: int64 [rows, cells].
        source_delta, destination_delta: int64 [rows, tensor dims]; see `sides`.
        pair_source, pair_destination, pair_elements: int64 [pairs] of shards that have elements in common.
        pair_first: Rows of pair p are those from pair_first[p] to pair_first[p + 1].
        need: int64 [destination shards], elements of this view that each has.
    """

    def __init__(self, source: Side, destination: Side) -> None:
        self.source, self.destination = source, destination
        self.need = np.zeros(len(destination.slots), dtype=np.int64)
        np.add.at(self.need, destination.shard, (destination.stop - destination.start).prod(axis=1))
        i, j = meeting((source.start, source.stop), (destination.start, destination.stop))
        shards = np.column_stack([destination.shard[j], source.shard[i]])
        key, self.start, self.stop = _merged(
            np.column_stack([shards, source.delta[i], destination.delta[j]]),
            np.maximum(source.start[i], destination.start[j]),
            np.minimum(source.stop[i], destination.stop[j]),
        )
        dims = len(source.frame)
        self.source_delta, self.destination_delta = key[:, 2 : 2 + dims], key[:, 2 + dims :]
        first = _firsts((key[1:, :2] == key[:-1, :2]).all(axis=1), len(key))
        self.pair_first = np.r_[first, len(key)]
        self.pair_destination, self.pair_source = key[first, 0], key[first, 1]
        total = np.r_[0, np.cumsum((self.stop - self.start).prod(axis=1))]
        self.pair_elements = total[self.pair_first[1:]] - total[self.pair_first[:-1]]

    @cached_property
    def missing(self) -> np.ndarray:
        """Elements of each destination shard that no source shard has."""
        got = np.zeros_like(self.need)
        np.add.at(got, self.pair_destination, self.pair_elements)
        return self.need - got


def _firsts(same: np.ndarray, count: int) -> np.ndarray:
    """Where runs of rows start, of which `same` says whether each belongs to the one before it."""
    return np.flatnonzero(np.r_[True, ~same]) if count else np.zeros(0, dtype=np.int64)


def _merged(key: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, ...]:
    """Join boxes with equal keys that touch in one dim and agree in all others; sorted by key."""
    order = np.lexsort((*start.T[::-1], *key.T[::-1]))
    key, start, stop = key[order], start[order], stop[order]
    before = math.inf
    while start.shape[1] > 1 and len(start) < before:  # in one dim nothing touches
        before = len(start)
        for d in range(start.shape[1]):
            others = np.column_stack([key, np.delete(start, d, axis=1), np.delete(stop, d, axis=1)])
            order = np.lexsort((start[:, d], *others.T[::-1]))
            others, key, start, stop = others[order], key[order], start[order], stop[order]
            touches = (others[1:] == others[:-1]).all(axis=1) & (start[1:, d] == stop[:-1, d])
            first = _firsts(touches, len(key))
            last = np.r_[first[1:], len(key)] - 1
            ends = stop[last, d]
            key, start, stop = key[first], start[first], stop[first]
            stop[:, d] = ends
    return key, start, stop
