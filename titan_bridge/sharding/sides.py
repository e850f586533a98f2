"""One side of a copy, brought into the coordinates that both sides share.

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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from titan_bridge.sharding.boxes import Box, axes_of, factored, local_shape_of, segments_of
from titan_bridge.sharding.holders import BoxHolders, Held
from titan_bridge.sharding.spec import placement_from_str, placement_to_str
from titan_bridge.sharding.view import View


@dataclass(frozen=True)
class DimFrame:
    """How one tensor dim is made of cells, row-major."""

    cells: tuple[int, ...]
    factors: tuple[int, ...]
    """Full size of each cell dim in this tensor."""
    offset: tuple[int, ...]
    """Where cell 0 lies in each factor."""
    limit: tuple[int, ...]
    """Number of cells in each."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Step of each cell dim, in positions of the tensor dim."""
        return tuple(math.prod(self.factors[i + 1 :]) for i in range(len(self.factors)))


Frame = tuple[DimFrame, ...]


def identity_frame(shape: Sequence[int]) -> Frame:
    """Every dim is its own cell dim."""
    return tuple(DimFrame((d,), (size,), (0,), (size,)) for d, size in enumerate(shape))


def titan_frame(view: View) -> Frame:
    """The TorchTitan tensor of a view."""
    frame, at = [], 0
    for factors in view.factors:
        cells = tuple(range(at, at + len(factors)))
        limit = tuple(view.index_shape[c] for c in cells)
        frame.append(DimFrame(cells, factors, tuple(view.index[c][0] for c in cells), limit))
        at += len(factors)
    return tuple(frame)


def external_frame(view: View) -> Frame:
    """The external tensor of a view; cells of size 1 need no place in it."""
    sizes = view.index_shape
    return tuple(
        DimFrame(group, tuple(sizes[c] for c in group), (0,) * len(group), tuple(sizes[c] for c in group))
        for group in view.groups
    )


@dataclass(frozen=True)
class Pieces:
    """Boxes of cells, each with the shard that has it. Arrays of int64, one row a box."""

    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    delta: np.ndarray
    """One column for each tensor dim of the side (zero for chunks: theirs is minus the start of the
    chunk)."""
    shards: int
    """How many shards there are, those without a box included."""

    @property
    def volume(self) -> np.ndarray:
        return (self.stop - self.start).prod(axis=1)


class MeshSide:
    """A tensor on a mesh: shards are a product over the dims, because an axis shards one dim at most."""

    joint = False

    def __init__(self, held: Held, frame: Frame) -> None:
        self.frame = frame
        self.shape = held.shape
        if isinstance(held.by, BoxHolders):  # every chunk is the whole tensor: one axis, which shards nothing
            self.mesh_shape: tuple[int, ...] = (len(held.by.chunks),)
            self.axes: list[list[int]] = [[] for _ in self.shape]
        else:
            self.mesh_shape, self.placements = held.by.mesh.shape, held.by.placements
            self.axes = [axes_of(self.placements, d) for d in range(len(self.shape))]

    def pieces(self, dims: Sequence[int], cells: Sequence[int], sizes: Sequence[int]) -> Pieces:
        """The boxes in `cells` that the tensor dims `dims` cut, over all shards of those dims."""
        columns = {cell: column for column, cell in enumerate(cells)}
        parts = []
        for d in dims:
            cuts = tuple((placement_to_str(self.placements[a]), self.mesh_shape[a]) for a in self.axes[d])
            parts.append(_dim_pieces(self.shape[d], cuts, self.frame[d]))
        # Cell dims of size 1 that this side does not have keep [0, size).
        count = math.prod(len(part.shard) for part in parts)
        rows = np.indices([len(part.shard) for part in parts]).reshape(len(parts), count)
        shard = np.zeros(count, dtype=np.int64)
        start = np.zeros((len(shard), len(cells)), dtype=np.int64)
        stop = np.broadcast_to(np.asarray(sizes, dtype=np.int64), start.shape).copy()
        delta = np.zeros((len(shard), len(dims)), dtype=np.int64)
        for column, (d, part, row) in enumerate(zip(dims, parts, rows, strict=True)):
            shard = shard * part.shards + part.shard[row]
            at = [columns[cell] for cell in self.frame[d].cells]
            start[:, at], stop[:, at] = part.start[row], part.stop[row]
            delta[:, column] = part.delta[row, 0]
        return Pieces(shard, start, stop, delta, math.prod(part.shards for part in parts))

    def slots(self, dims: Sequence[Sequence[int]]) -> np.ndarray:
        """[shards, replicas]: positions on the mesh, for shards numbered row-major over the groups of
        `dims`."""
        order = [axis for group in dims for d in group for axis in self.axes[d]]
        shards = math.prod(self.mesh_shape[axis] for axis in order)
        order += [axis for axis in range(len(self.mesh_shape)) if axis not in order]
        positions = np.arange(math.prod(self.mesh_shape), dtype=np.int64).reshape(self.mesh_shape)
        return positions.transpose(order).reshape(shards, -1)

    def local_shape(self, slot: int) -> tuple[int, ...]:
        """Shape of the local tensor at a position on the mesh."""
        if not any(self.axes):
            return self.shape
        coordinate = tuple(int(c) for c in np.unravel_index(slot, self.mesh_shape))
        return local_shape_of(self.placements, self.shape, self.mesh_shape, coordinate)

    def origin(self, slot: int) -> tuple[int, ...]:
        """What to subtract from positions beside the delta of the piece: nothing."""
        return (0,) * len(self.shape)


class ChunkSide:
    """A tensor in chunks: shards are boxes of all dims together.

    As a source, chunks that overlap are cut so that shards are disjoint; a shard's slots are all chunks that
    contain it. As a destination every distinct box is a shard, since each has to be written in full.
    """

    joint = True

    def __init__(self, held: Held, frame: Frame, *, disjoint: bool) -> None:
        assert isinstance(held.by, BoxHolders)
        self.frame = frame
        self.shape = held.shape
        self.boxes = [box for _, box in held.by.chunks]
        by_box: dict[Box, list[int]] = {}
        for slot, box in enumerate(self.boxes):
            by_box.setdefault(box, []).append(slot)
        self._shards: list[tuple[tuple[Box, ...], list[int]]] = [
            ((box,), slots) for box, slots in by_box.items() if box.numel
        ]
        if disjoint and _overlap([box for box in by_box if box.numel]):
            self._shards = _atoms(self._shards)

    def pieces(self, dims: Sequence[int], cells: Sequence[int], sizes: Sequence[int]) -> Pieces:
        """All boxes; `dims` and `cells` are all there are."""
        columns = {cell: column for column, cell in enumerate(cells)}
        shard, start, stop = [], [], []
        for index, (boxes, _) in enumerate(self._shards):
            for box in boxes:
                per_dim = [
                    list(_cells(box.start[d], box.stop[d], frame)) for d, frame in enumerate(self.frame)
                ]
                for parts in itertools.product(*per_dim):
                    first, last = [0] * len(cells), list(sizes)
                    for frame, part in zip(self.frame, parts, strict=True):
                        for cell, (a, b) in zip(frame.cells, part, strict=True):
                            first[columns[cell]], last[columns[cell]] = a, b
                    shard.append(index)
                    start.append(first)
                    stop.append(last)
        shape = (len(shard), len(cells))
        return Pieces(
            np.asarray(shard, dtype=np.int64),
            np.asarray(start, dtype=np.int64).reshape(shape),
            np.asarray(stop, dtype=np.int64).reshape(shape),
            np.zeros((len(shard), len(dims)), dtype=np.int64),
            len(self._shards),
        )

    def slots(self, dims: Sequence[Sequence[int]]) -> np.ndarray:
        """[shards, replicas]: indices of chunks, filled up with -1."""
        width = max((len(slots) for _, slots in self._shards), default=0)
        rows = [slots + [-1] * (width - len(slots)) for _, slots in self._shards]
        return np.asarray(rows, dtype=np.int64).reshape(len(rows), width)

    def local_shape(self, slot: int) -> tuple[int, ...]:
        """Shape of a chunk."""
        return self.boxes[slot].shape

    def origin(self, slot: int) -> tuple[int, ...]:
        """Where the chunk starts in the global tensor."""
        return self.boxes[slot].start


def side_of(held: Held, frame: Frame, *, source: bool) -> MeshSide | ChunkSide:
    """The side that a tensor makes; whole tensors take the cheap way."""
    if isinstance(held.by, BoxHolders) and any(box != Box.whole(held.shape) for _, box in held.by.chunks):
        return ChunkSide(held, frame, disjoint=source)
    return MeshSide(held, frame)


def _cells(start: int, stop: int, frame: DimFrame):
    """The interval of a tensor dim as boxes of cells: one (first, last) for each cell dim."""
    if not frame.cells:
        if start < stop:
            yield ()
        return
    for part in factored(start, stop, frame.factors):
        spans = zip(part, frame.offset, frame.limit, strict=True)
        box = tuple((max(a - low, 0), min(b - low, size)) for (a, b), low, size in spans)
        if all(a < b for a, b in box):
            yield box


@lru_cache(maxsize=4096)
def _dim_pieces(size: int, cuts: tuple[tuple[str, int], ...], frame: DimFrame) -> Pieces:
    placements = [placement_from_str(text) for text, _ in cuts]
    chunks = [n for _, n in cuts]
    shard, start, stop, delta = [], [], [], []
    for index, coordinate in enumerate(itertools.product(*map(range, chunks))):
        for a, b, local in segments_of(size, list(zip(placements, chunks, coordinate, strict=True))):
            for box in _cells(a, b, frame):
                shard.append(index)
                start.append([first for first, _ in box])
                stop.append([last for _, last in box])
                delta.append(local - a)
    shape = (len(shard), len(frame.cells))
    return Pieces(
        np.asarray(shard, dtype=np.int64),
        np.asarray(start, dtype=np.int64).reshape(shape),
        np.asarray(stop, dtype=np.int64).reshape(shape),
        np.asarray(delta, dtype=np.int64).reshape(-1, 1),
        math.prod(chunks),
    )


def _overlap(boxes: list[Box]) -> bool:
    if len(boxes) < 2 or not boxes[0].ndim:
        return len(boxes) > 1
    start, stop = np.array([box.start for box in boxes]), np.array([box.stop for box in boxes])
    meets = np.ones((len(boxes), len(boxes)), dtype=bool)
    for d in range(start.shape[1]):
        meets &= (start[:, None, d] < stop[None, :, d]) & (start[None, :, d] < stop[:, None, d])
    return int(meets.sum()) > len(boxes)


def _atoms(shards: list[tuple[tuple[Box, ...], list[int]]]) -> list[tuple[tuple[Box, ...], list[int]]]:
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
    return [(tuple(boxes), list(slots)) for slots, boxes in result.items()]
