"""Which part of a global tensor a rank holds, as half-open boxes.

The invariant: for any placements and any mesh, the boxes of all coordinates are equal or disjoint, and
together they cover the tensor. It holds dim by dim, because a mesh axis shards at most one tensor dim: what a
rank holds is the product, over the dims, of one list of intervals each. Most dims have one interval; a
`_StridedShard` (FSDP laid over TP on one dim) has several, which lie one after the other in the rank's local
tensor.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from titan_bridge.errors import BridgeError
from titan_bridge.sharding import dtensor

Sizes = Sequence[int]
Placements: TypeAlias = "Sequence[dtensor.Placement]"
Ends = tuple[np.ndarray, np.ndarray]  # (start, stop) of boxes, int64 [boxes, dims]
Segment = tuple[int, int, int]  # (global start, global stop, local start) along one dim
_BLOCK = 4_000_000  # pairs of boxes that are looked at together


@dataclass(frozen=True, kw_only=True, order=True)
class Box:
    """A half-open n-d interval: the elements `i` with `start[d] <= i[d] < stop[d]` for every dim `d`.
    A 0-d box holds one element (a scalar tensor)."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        ends = zip(self.start, self.stop, strict=False)
        if len(self.start) != len(self.stop) or any(not 0 <= a <= b for a, b in ends):
            raise BridgeError(f"a box needs 0 <= start <= stop in every dim, not {self.start}, {self.stop}")

    @classmethod
    def whole(cls, shape: Sizes) -> Box:
        """The box of a whole tensor of this (global) shape."""
        return cls(start=(0,) * len(shape), stop=tuple(shape))

    @property
    def ndim(self) -> int:
        return len(self.start)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """Elements in the box, not bytes."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """For indexing a tensor or an array: `tensor[box.slices]`."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common part, or None when there is not one element in it."""
        start, stop = tuple(map(max, self.start, other.start)), tuple(map(min, self.stop, other.stop))
        return Box(start=start, stop=stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def contains(self, other: Box) -> bool:
        """True when every element of `other` is in this box."""
        return all(a <= c for a, c in zip(self.start, other.start, strict=True)) and all(
            d <= b for b, d in zip(self.stop, other.stop, strict=True)
        )

    def relative_to(self, origin: Sizes) -> Box:
        """The same box seen from `origin`: coordinates inside a tensor that starts there."""
        start, stop = (tuple(map(operator.sub, end, origin)) for end in (self.start, self.stop))
        return Box(start=start, stop=stop)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One box of a rank and where it lies in the rank's local tensor; both have the same shape."""

    box: Box  # in the global tensor
    local: Box
    """In the local tensor, which is contiguous in torch's sense and as large as all pieces together."""


def chunk(size: int, chunks: int, index: int) -> tuple[int, int]:
    """Half-open interval of chunk `index` as torch.chunk cuts `size` into `chunks` (the last may be short or empty)."""
    width = -(-size // chunks)
    return min(width * index, size), min(width * (index + 1), size)


def segments_of(size: int, cuts: Sequence[tuple[dtensor.Placement, int, int]]) -> tuple[Segment, ...]:
    """What remains of a dim of `size` elements after `cuts`, in the order in which it lies in the local tensor.
    `cuts`: (placement, size of the mesh axis, coordinate on it) of each axis that shards this dim, left to right."""
    held = [(0, size)]
    for placement, chunks, index in cuts:
        local = sum(b - a for a, b in held)
        if isinstance(placement, dtensor._StridedShard):
            factor = int(placement.split_factor)
            outer = [chunk(local, factor, part) for part in range(factor)]
            inner = [(a, chunk(b - a, chunks, index)) for a, b in outer]
            taken = [(a + c, a + d) for a, (c, d) in inner if c < d]
        else:
            taken = [chunk(local, chunks, index)]
        held = _take(held, taken)
    starts = itertools.accumulate((b - a for a, b in held), initial=0)
    return tuple((a, b, at) for (a, b), at in zip(held, starts, strict=False))


def fsdp_is_exact(size: int, shards: int, fsdp: int) -> bool:
    """Whether `fully_shard` leaves what its placements say, on a dim of `size` that is cut into `shards` already.

    It cuts each shard in `fsdp` chunks and calls the result `(_StridedShard(split_factor=shards), Shard)`. Uneven cuts
    may leave other rows than that (9 rows on fsdp=4, tp=2 with torch 2.13: the rank at (3, 1) holds one, and DTensor
    says none), and neither DTensor nor a spec can put the tensor together again.
    """
    strided, shard = dtensor._StridedShard(0, split_factor=shards), dtensor.Shard(0)
    for right, left in itertools.product(range(shards), range(fsdp)):
        first, last = chunk(size, shards, right)
        a, b = chunk(last - first, fsdp, left)
        real = ((first + a, first + b, 0),) if a < b else ()
        if segments_of(size, [(strided, fsdp, left), (shard, shards, right)]) != real:
            return False
    return True


def _take(held: list[tuple[int, int]], taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The global intervals of the local intervals `taken` out of `held`; touching neighbours become one."""
    result: list[tuple[int, int]] = []
    for start, stop in taken:
        at = 0
        for a, b in held:
            first, last = max(start, at), min(stop, at + b - a)
            if first < last:
                interval = (a + first - at, a + last - at)
                if result and result[-1][1] == interval[0]:
                    result[-1] = (result[-1][0], interval[1])
                else:
                    result.append(interval)
            at += b - a
    return result


def shard_dim(placement: dtensor.Placement) -> int | None:
    """The tensor dim that a placement shards, or None for Replicate."""
    return placement.dim if isinstance(placement, (dtensor.Shard, dtensor._StridedShard)) else None


def axes_of(placements: Placements, dim: int) -> list[int]:
    """The mesh axes that shard a tensor dim, from left to right."""
    return [axis for axis, placement in enumerate(placements) if shard_dim(placement) == dim]


def check(placements: Placements, shape: Sizes, mesh_shape: Sizes) -> None:
    """Raise BridgeError unless `placements` fit the tensor (global `shape`) and the mesh."""
    if len(placements) != len(mesh_shape):
        given = f"{len(placements)} placements for a mesh with {len(mesh_shape)} axes"
        raise BridgeError(f"{given}; give one for each axis")
    for axis, placement in enumerate(placements):
        if isinstance(placement, dtensor.Replicate):
            continue
        if (dim := shard_dim(placement)) is None:
            raise BridgeError(
                f"placement {placement} on mesh axis {axis}; a parameter can be R, S(d) or SS(d,f)"
            )
        if not 0 <= dim < len(shape):
            what = f"placement {placement} on mesh axis {axis} shards dim {dim} of a tensor of shape {tuple(shape)}"
            raise BridgeError(f"{what}; allowed: 0 to {len(shape) - 1}")


def dim_segments(placements: Placements, shape: Sizes, mesh: Sizes, at: Sizes) -> list[tuple[Segment, ...]]:
    """The segments of every dim of a tensor (global `shape`) for the rank at a coordinate; see `segments_of`."""
    check(placements, shape, mesh)
    if len(at) != len(mesh) or any(not 0 <= i < n for i, n in zip(at, mesh, strict=True)):
        raise BridgeError(f"coordinate {tuple(at)} is not on a mesh of shape {tuple(mesh)}")
    cuts: list[list[tuple[dtensor.Placement, int, int]]] = [[] for _ in shape]
    for placement, chunks, index in zip(placements, mesh, at, strict=True):
        if (dim := shard_dim(placement)) is not None:
            cuts[dim].append((placement, chunks, index))
    return [segments_of(size, cut) for size, cut in zip(shape, cuts, strict=True)]


def pieces_of(placements: Placements, shape: Sizes, mesh: Sizes, coordinate: Sizes) -> tuple[Piece, ...]:
    """The boxes that the rank at `coordinate` holds of a tensor of global `shape`, and where in its local tensor.
    Equal to what `distribute_tensor` puts there; empty where there are more ranks than rows.
    Raises BridgeError when the arguments do not fit together."""
    return tuple(
        Piece(
            box=Box(start=tuple(a for a, _, _ in part), stop=tuple(b for _, b, _ in part)),
            local=Box(start=tuple(at for _, _, at in part), stop=tuple(at + b - a for a, b, at in part)),
        )
        for part in itertools.product(*dim_segments(placements, shape, mesh, coordinate))
    )


def local_shape_of(placements: Placements, shape: Sizes, mesh: Sizes, coordinate: Sizes) -> tuple[int, ...]:
    """The shape of the local tensor of the rank at `coordinate`, for a tensor of global `shape`."""
    dims = dim_segments(placements, shape, mesh, coordinate)
    return tuple(sum(b - a for a, b, _ in segments) for segments in dims)


def contiguous_stride(shape: Sizes) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def meeting(a: Ends, b: Ends) -> tuple[np.ndarray, np.ndarray]:
    """Indices (into a, into b) of the pairs of boxes that have an element in common.
    Boxes are swept along the dim that separates them best, so that the cost follows the pairs that meet there; 32 bytes
    of memory for each of at most `_BLOCK` of these."""
    (a_start, a_stop), (b_start, b_stop) = a, b
    dims = a_start.shape[1]
    if not dims:  # scalars
        i, j = np.indices((len(a_start), len(b_start))).reshape(2, -1)
        return i, j
    sweeps = []
    for d in range(dims):
        order = np.argsort(a_start[:, d], kind="stable")
        reached = np.maximum.accumulate(a_stop[order, d])
        first = np.searchsorted(reached, b_start[:, d], side="right")
        count = np.maximum(np.searchsorted(a_start[order, d], b_stop[:, d], side="left") - first, 0)
        sweeps.append((order, first, count))
    order, first, count = min(sweeps, key=lambda sweep: sweep[2].sum())
    ends = np.cumsum(count)
    found = [np.zeros((2, 0), dtype=np.int64)]
    at = 0
    while at < len(count):
        last = max(at + 1, int(np.searchsorted(ends, (ends[at - 1] if at else 0) + _BLOCK, side="right")))
        n = count[at:last]
        j = np.repeat(np.arange(at, last), n)
        step = np.arange(len(j)) - np.repeat(np.cumsum(n) - n, n)
        i = order[first[j] + step]
        meets = np.ones(len(j), dtype=bool)
        for d in range(dims):
            meets &= (a_start[i, d] < b_stop[j, d]) & (b_start[j, d] < a_stop[i, d])
        found.append(np.stack([i[meets], j[meets]]))
        at = last
    i, j = np.concatenate(found, axis=1)
    return i, j


def factored(start: int, stop: int, factors: Sizes) -> Iterator[tuple[tuple[int, int], ...]]:
    """The interval `[start, stop)` of a dim as boxes of its row-major factors: one half-open interval a factor."""
    if start >= stop:
        return
    inner = math.prod(factors[1:])
    first, last = -(-start // inner), stop // inner

    def in_row(row: int, a: int, b: int) -> Iterator[tuple[tuple[int, int], ...]]:
        for rest in factored(a - row * inner, b - row * inner, factors[1:]):
            yield ((row, row + 1), *rest)

    if first > last:  # all of it is inside one row of the outermost factor
        yield from in_row(last, start, stop)
        return
    yield from in_row(first - 1, start, first * inner)
    if first < last:
        yield ((first, last), *((0, size) for size in factors[1:]))
    yield from in_row(last, last * inner, stop)
