"""How a destination is cut into steps of work: strips of a few megabytes of one tensor, in the order of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from titan_bridge.checkpoint.target import Part, Unit, rows_of
from titan_bridge.sharding.boxes import Box
from titan_bridge.sharding.tensors import Chunk, TensorMetadata

STRIP_BYTES = 8 << 20
"""Of the destination's dtype."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One step of the work."""

    unit: Unit
    box: Box
    """In the global tensor; inside the unit's box."""
    chunk: int
    """Its number among the strips of the tensor, which is how the plan knows it."""


def strips_of(parts: Sequence[Part], strip_bytes: int = STRIP_BYTES) -> dict[str, list[Strip]]:
    """The strips of each part, in the order in which they are written."""
    result: dict[str, list[Strip]] = {}
    counts: dict[str, int] = {}
    for part in parts:
        strips = result.setdefault(part.name, [])
        for unit in part.units:
            tensor = unit.tensor
            for box in rows_of(unit.box, tensor.dtype.itemsize, strip_bytes, tensor.align):
                chunk = counts.get(tensor.name, 0)
                strips.append(Strip(unit=unit, box=box, chunk=chunk))
                counts[tensor.name] = chunk + 1
    return result


def held_strips(strips: Mapping[str, Sequence[Strip]]) -> list[TensorMetadata]:
    """All strips as the destination of a plan: a part is an owner, a strip a chunk."""
    chunks: dict[str, list[Chunk]] = {}
    tensors = {}
    for part, own in strips.items():
        for strip in own:
            chunks.setdefault(strip.unit.tensor.name, []).append(Chunk(owner=part, box=strip.box))
            tensors[strip.unit.tensor.name] = strip.unit.tensor
    return [
        TensorMetadata(name=name, shape=tensor.shape, dtype=tensor.dtype, chunks=tuple(chunks[name]))
        for name, tensor in tensors.items()
    ]
