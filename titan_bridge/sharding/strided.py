"""Cuts of a view as strided windows: what to copy from an external tensor into one rank's local tensor.

Row-major factoring of a dim keeps strides, so a box in factored dims is a strided window of the local tensor
whatever the sharding, and the same box is a strided window of the external tensor. One `copy_` each, no gather.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from titan_bridge.sharding.boxes import Piece
from titan_bridge.sharding.view import View

Window = tuple[tuple[int, ...], tuple[int, ...], int]
"""(size, stride, storage offset) in elements, as `torch.Tensor.as_strided` takes them."""


def factored(start: int, stop: int, factors: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """The interval `[start, stop)` of a dim as boxes of its row-major factors: one half-open interval a factor."""
    if len(factors) == 1:
        if start < stop:
            yield ((start, stop),)
        return
    inner = math.prod(factors[1:])
    first, last = -(-start // inner), stop // inner
    if first > last:  # inside one row of the outermost factor
        row = start // inner
        for rest in factored(start - row * inner, stop - row * inner, factors[1:]):
            yield ((row, row + 1), *rest)
        return
    if start < first * inner:
        for rest in factored(start - (first - 1) * inner, inner, factors[1:]):
            yield ((first - 1, first), *rest)
    if first < last:
        yield ((first, last), *((0, size) for size in factors[1:]))
    if last * inner < stop:
        for rest in factored(0, stop - last * inner, factors[1:]):
            yield ((last, last + 1), *rest)


def strided_copies(
    view: View, pieces: Sequence[Piece], local_stride: Sequence[int], external_stride: Sequence[int]
) -> Iterator[tuple[Window, Window]]:
    """Pairs of equally shaped windows `(local, external)`: together they are what `pieces` hold of the view.

    Args:
        view: Global shapes.
        pieces: What the rank holds of the TorchTitan tensor (`spec.pieces`).
        local_stride: Strides in elements of the rank's local tensor.
        external_stride: Strides in elements of the whole external tensor; its storage offset counts as 0.
    """
    flat_local = _factor_strides(view.factors, local_stride)
    flat_external = _external_strides(view, external_stride)
    for piece in pieces:
        dims = zip(piece.box.start, piece.box.stop, view.factors, strict=True)
        for parts in itertools.product(*(list(factored(a, b, f)) for a, b, f in dims)):
            box = _inside(tuple(itertools.chain.from_iterable(parts)), view.index)
            if box is None:
                continue
            size = tuple(b - a for a, b in box)
            shift = sum(
                (at - a) * s
                for a, at, s in zip(piece.box.start, piece.local.start, local_stride, strict=True)
            )
            local = shift + sum(a * s for (a, _), s in zip(box, flat_local, strict=True))
            external = sum(
                (a - low) * s for (a, _), (low, _), s in zip(box, view.index, flat_external, strict=True)
            )
            yield (size, flat_local, local), (size, flat_external, external)


def _inside(
    box: tuple[tuple[int, int], ...], index: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...] | None:
    cut = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, index, strict=True))
    return cut if all(a < b for a, b in cut) else None


def _factor_strides(factors: Sequence[Sequence[int]], stride: Sequence[int]) -> tuple[int, ...]:
    return tuple(
        s * math.prod(dim[i + 1 :]) for dim, s in zip(factors, stride, strict=True) for i in range(len(dim))
    )


def _external_strides(view: View, stride: Sequence[int]) -> tuple[int, ...]:
    """Stride in the external tensor of each factored dim (0 for dims of one element, which never move)."""
    result = [0] * len(view.index)
    sizes = view.index_shape
    for group, step in zip(view.groups, stride, strict=True):
        for at, dim in enumerate(group):
            result[dim] = step * math.prod(sizes[other] for other in group[at + 1 :])
    return tuple(result)
