"""Which source shard meets which destination shard, for one kind of tensor (same shape, placements and mesh
shapes).

The cell dims fall into groups that neither side mixes; most groups are one dim. A table for each group says
where shards of the two sides meet, and the boxes of the tensor are the product of the tables, which is never
written out but for three numbers a row: source shard, destination shard, elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from titan_bridge.sharding.sides import ChunkSide, MeshSide, Pieces

_BLOCK = 4_000_000
"""Pairs looked at together where every box has to be held against every other: bounds the memory."""


@dataclass(frozen=True)
class Table:
    """Where pieces of both sides meet in one group of cell dims: one row a box, merged with its
    neighbours."""

    cells: tuple[int, ...]
    source_dims: tuple[int, ...]
    destination_dims: tuple[int, ...]
    source: Pieces
    """`start` and `stop` are those of the common box, in both."""
    destination: Pieces
    need: np.ndarray
    """Cells of the group that each destination shard has."""


class Geometry:
    """All boxes of one kind of tensor.

    Args:
        source, destination: The sides, in the cells of one view.
        sizes: Size of each cell dim.
    """

    def __init__(
        self, source: MeshSide | ChunkSide, destination: MeshSide | ChunkSide, sizes: Sequence[int]
    ) -> None:
        self.source, self.destination = source, destination
        self.sizes = tuple(sizes)
        self.tables = [self._table(*group) for group in _groups(source, destination, len(self.sizes))]
        self.source_slots = source.slots([table.source_dims for table in self.tables])
        """[source shards, replicas] of mesh positions or chunk indices, -1 where there are fewer replicas."""
        self.destination_slots = destination.slots([table.destination_dims for table in self.tables])
        self._rows()

    def _table(
        self, cells: tuple[int, ...], source_dims: tuple[int, ...], destination_dims: tuple[int, ...]
    ) -> Table:
        sizes = [self.sizes[cell] for cell in cells]
        a = self.source.pieces(source_dims, cells, sizes)
        b = self.destination.pieces(destination_dims, cells, sizes)
        need = np.zeros(b.shards, dtype=np.int64)
        np.add.at(need, b.shard, b.volume)
        i, j = _meet(a, b)
        start, stop = np.maximum(a.start[i], b.start[j]), np.minimum(a.stop[i], b.stop[j])
        key = np.column_stack([a.shard[i], b.shard[j], a.delta[i], b.delta[j]])
        key, start, stop = _merge(key, start, stop)
        split = 2 + len(source_dims)
        return Table(
            cells,
            source_dims,
            destination_dims,
            Pieces(key[:, 0], start, stop, key[:, 2:split], a.shards),
            Pieces(key[:, 1], start, stop, key[:, split:], b.shards),
            need,
        )

    def _rows(self) -> None:
        """The product of the tables, put in order of the (source shard, destination shard) pairs."""
        s, t, elements = (np.array([first], dtype=np.int64) for first in (0, 0, 1))
        need = np.ones(1, dtype=np.int64)
        for table in self.tables:
            s = (s[:, None] * table.source.shards + table.source.shard).ravel()
            t = (t[:, None] * table.destination.shards + table.destination.shard).ravel()
            elements = (elements[:, None] * table.source.volume).ravel()
            need = (need[:, None] * table.need).ravel()
        self.need = need
        """Elements of this view that each destination shard has."""
        key = t * max(len(self.source_slots), 1) + s
        self.row_order = np.argsort(key, kind="stable")
        key = key[self.row_order]
        first = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else np.zeros(0, dtype=np.int64)
        self.pair_first = np.r_[first, len(key)]
        """Rows of pair p are row_order[pair_first[p]:pair_first[p + 1]]; pairs are sorted by destination."""
        self.pair_source, self.pair_destination = s[self.row_order][first], t[self.row_order][first]
        total = np.r_[0, np.cumsum(elements[self.row_order])]
        self.pair_elements = total[self.pair_first[1:]] - total[self.pair_first[:-1]]

    @property
    def boxes(self) -> int:
        """Boxes between distinct shards, replicas left out."""
        return len(self.row_order)

    @cached_property
    def missing(self) -> np.ndarray:
        """Elements of each destination shard that no source shard has."""
        got = np.zeros_like(self.need)
        np.add.at(got, self.pair_destination, self.pair_elements)
        return self.need - got

    def row(self, row: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """(start, stop) in cells, and the deltas of the source's and the destination's tensor dims."""
        start, stop = [0] * len(self.sizes), list(self.sizes)
        source, destination = [0] * len(self.source.frame), [0] * len(self.destination.frame)
        at = np.unravel_index(row, [len(table.source.shard) for table in self.tables])
        for table, index in zip(self.tables, at, strict=True):
            for column, cell in enumerate(table.cells):
                start[cell] = int(table.source.start[index, column])
                stop[cell] = int(table.source.stop[index, column])
            for column, d in enumerate(table.source_dims):
                source[d] = int(table.source.delta[index, column])
            for column, d in enumerate(table.destination_dims):
                destination[d] = int(table.destination.delta[index, column])
        return tuple(start), tuple(stop), tuple(source), tuple(destination)


def _groups(source: MeshSide | ChunkSide, destination: MeshSide | ChunkSide, cells: int):
    """(cells, source dims, destination dims) that can be looked at without the others."""
    sides = (source.frame, destination.frame)
    if source.joint or destination.joint:
        yield tuple(range(cells)), tuple(range(len(sides[0]))), tuple(range(len(sides[1])))
        return
    leader = list(range(cells))

    def find(cell: int) -> int:
        while leader[cell] != cell:
            cell = leader[cell]
        return cell

    for frame in sides:
        for dim in frame:
            for cell in dim.cells[1:]:
                leader[find(cell)] = find(dim.cells[0])
    for root in sorted({find(cell) for cell in range(cells)}):
        dims = [
            tuple(d for d, dim in enumerate(frame) if dim.cells and find(dim.cells[0]) == root)
            for frame in sides
        ]
        yield tuple(cell for cell in range(cells) if find(cell) == root), *dims
    # A tensor dim of one element may have no cell, and still be sharded: then only one shard has the tensor.
    for side, frame in enumerate(sides):
        for d, dim in enumerate(frame):
            if not dim.cells:
                yield (), ((d,) if side == 0 else ()), ((d,) if side == 1 else ())


def _meet(a: Pieces, b: Pieces) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs of pieces that have a cell in common."""
    if a.start.shape[1] == 1:
        # One dim, and source pieces are disjoint: those that meet a piece of b are neighbours in order.
        order = np.argsort(a.start[:, 0], kind="stable")
        first = np.searchsorted(a.stop[order, 0], b.start[:, 0], side="right")
        count = np.maximum(np.searchsorted(a.start[order, 0], b.stop[:, 0], side="left") - first, 0)
        j = np.repeat(np.arange(len(count)), count)
        step = np.arange(len(j)) - np.repeat(np.cumsum(count) - count, count)
        return order[first[j] + step], j
    found = []
    width = max(1, _BLOCK // max(1, len(a.shard)))
    for at in range(0, len(b.shard), width):
        start, stop = b.start[at : at + width], b.stop[at : at + width]
        meets = np.ones((len(start), len(a.shard)), dtype=bool)
        for d in range(start.shape[1]):
            meets &= (a.start[None, :, d] < stop[:, None, d]) & (start[:, None, d] < a.stop[None, :, d])
        j, i = np.nonzero(meets)
        found.append((i, j + at))
    if not found:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return np.concatenate([i for i, _ in found]), np.concatenate([j for _, j in found])


def _merge(key: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, ...]:
    """Join boxes with equal keys that touch in one dim and agree in all others."""
    dims = start.shape[1]
    before = math.inf
    while dims > 1 and len(start) < before:  # in one dim, pieces that touch were merged when they were made
        before = len(start)
        for d in range(dims):
            others = [column for e in range(dims) if e != d for column in (start[:, e], stop[:, e])]
            columns = np.column_stack([key, *others])
            order = np.lexsort((start[:, d], *columns.T[::-1]))
            key, start, stop, columns = key[order], start[order], stop[order], columns[order]
            same = (columns[1:] == columns[:-1]).all(axis=1) & (start[1:, d] == stop[:-1, d])
            first = np.flatnonzero(np.r_[True, ~same]) if len(key) else np.zeros(0, dtype=np.int64)
            last = np.r_[first[1:], len(key)] - 1 if len(key) else first
            stop_d = stop[last, d]
            key, start, stop = key[first], start[first], stop[first]
            stop[:, d] = stop_d
    return key, start, stop
