"""Which source shard meets which destination shard, for one kind of tensor: same shape, placements and mesh shapes."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from titan_bridge.sharding.boxes import meeting
from titan_bridge.sharding.sides import Side


class Geometry:
    """All boxes that the two sides have in common, one row each, in order of destination and source shard.

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
