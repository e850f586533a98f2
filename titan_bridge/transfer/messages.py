"""The messages between a trainer rank and a worker: the plan's copies, cut and joined into buckets.

Both ends cut the same copies in the same order, so a bucket needs no header: not a byte travels that is not
weight. A bucket holds elements of one dtype, that of the destination; copies larger than a bucket are cut along
their outer dims. A delta sends, for each slice of each bucket, the positions that changed in it, and their values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from titan_bridge.sharding.layout import itemsize, torch_dtype
from titan_bridge.sharding.moves import Window, cut
from titan_bridge.sharding.plan import Plan
from titan_bridge.transfer.protocol import BUCKET_BYTES

ALONE_BYTES = 2**19
"""A copy of this size, or of a quarter of a bucket, is a message of its own: where it is contiguous, it then leaves
and arrives where it belongs, without being packed."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A window of this rank's local tensor `name`, laid flat at `[at, at + elements)` of its bucket."""

    name: str
    served: str  # name of the engine's tensor: the same at both ends
    window: Window
    at: int
    elements: int

    def flat(self, positions: torch.Tensor) -> torch.Tensor:
        """int64: where row-major positions in the window lie in the flat local tensor."""
        rest = positions.long()
        if self.window.is_run:
            return rest + self.window.offset
        result = torch.full_like(rest, self.window.offset)
        for size, stride in zip(reversed(self.window.size), reversed(self.window.stride), strict=True):
            outer = torch.div(rest, size, rounding_mode="floor")
            result = result + (rest - outer * size) * stride
            rest = outer
        return result


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
        """Which elements of a flat local tensor are the message as it travels; None if it is packed."""
        window = self.slices[0].window
        if len(self.slices) > 1 or not window.is_run:
            return None
        return slice(window.offset, window.offset + self.elements)


def messages(
    plan: Plan,
    dtypes: Mapping[str, str],
    *,
    sender: int | None = None,
    receiver: int | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> dict[int, tuple[Bucket, ...]]:
    """The messages out of `sender`, or into `receiver` (give one), in order, by the rank at the other end.

    No rank of the plan is on both sides, as in `layouts.Sides`. `dtypes`: on the wire, by destination name. A message
    has at most `bucket_bytes`, or one element.
    """
    assert (sender is None) != (receiver is None), "one end"
    found: dict[int, dict[str, list[Slice]]] = {}
    for copy in plan.copies(source=sender, destination=receiver):
        served = copy.destination_name
        if receiver is None:
            peer, name, window = copy.destination, copy.source_name, copy.source_window
        else:
            peer, name, window = copy.source, served, copy.destination_window
        assert isinstance(peer, int)
        most = max(1, bucket_bytes // itemsize(dtypes[served]))
        found.setdefault(peer, {}).setdefault(dtypes[served], []).extend(
            Slice(name=name, served=served, window=part, at=0, elements=math.prod(part.size))
            for part in map(window.at, cut(window.size, range(len(window.size)), most))
        )
    packed = {
        peer: [_packed(parts, dtype, bucket_bytes) for dtype, parts in found[peer].items()] for peer in found
    }
    return {peer: tuple(itertools.chain(*packed[peer])) for peer in sorted(found)}


def _packed(parts: Sequence[Slice], name: str, bucket_bytes: int) -> Iterator[Bucket]:
    dtype = torch_dtype(name)
    most = max(1, bucket_bytes // dtype.itemsize)
    alone = max(1, min(ALONE_BYTES // dtype.itemsize, most // 4))
    slices: list[Slice] = []
    at = 0
    for part in parts:
        if part.elements >= alone:
            yield Bucket(dtype=dtype, slices=(part,))
            continue
        if slices and at + part.elements > most:
            yield Bucket(dtype=dtype, slices=tuple(slices))
            slices, at = [], 0
        slices.append(replace(part, at=at))
        at += part.elements
    if slices:
        yield Bucket(dtype=dtype, slices=tuple(slices))
