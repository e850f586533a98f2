"""Who holds which part of a tensor: ranks of a mesh, or an explicit list (files, chunks of a checkpoint)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from titan_bridge.errors import BridgeError
from titan_bridge.sharding import dtensor
from titan_bridge.sharding.boxes import Box, check
from titan_bridge.sharding.layout import Layout, MeshLayout, itemsize

Holder = int | str
"""A rank (int) or a file (str)."""


@dataclass(frozen=True, kw_only=True)
class MeshHolders:
    """The ranks of a mesh, each with one contiguous local tensor, as the placements say."""

    mesh: MeshLayout
    placements: tuple[dtensor.Placement, ...]


@dataclass(frozen=True, kw_only=True)
class BoxHolders:
    """An explicit list of chunks. Each chunk is a contiguous tensor of its own, as large as its box.

    A holder may appear several times, and several holders may have the same or overlapping boxes.
    """

    chunks: tuple[tuple[Holder, Box], ...]


@dataclass(frozen=True, kw_only=True)
class Held:
    """One tensor on one side of a plan."""

    name: str
    shape: tuple[int, ...]
    """Global shape."""
    dtype: str
    """Name of the torch dtype in storage, for example "bfloat16"."""
    by: MeshHolders | BoxHolders

    def __post_init__(self) -> None:
        itemsize(self.dtype)
        if isinstance(self.by, MeshHolders):
            check(self.by.placements, self.shape, self.by.mesh.shape)
            return
        if not self.by.chunks:
            raise BridgeError(f"{self.name}: no holder given; name at least one rank or file")
        for holder, box in self.by.chunks:
            if box.ndim != len(self.shape) or not Box.whole(self.shape).contains(box):
                raise BridgeError(f"{self.name}: chunk {box} of {holder} is not inside shape {self.shape}")

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...], dtype: str, *holders: Holder) -> Held:
        """A tensor that every one of `holders` has in full, as a Hugging Face file has."""
        box = Box.whole(shape)
        by = BoxHolders(chunks=tuple((holder, box) for holder in holders))
        return cls(name=name, shape=tuple(shape), dtype=dtype, by=by)

    @property
    def nbytes(self) -> int:
        """Bytes of the global tensor."""
        return math.prod(self.shape) * itemsize(self.dtype)


def held_in(tensors: Layout | Iterable[Held]) -> dict[str, Held]:
    """The tensors of one side by name. Raises BridgeError when a name appears twice."""
    if isinstance(tensors, Layout):
        return {
            fqn: Held(
                name=fqn,
                shape=param.shape,
                dtype=param.dtype,
                by=MeshHolders(mesh=tensors.meshes[param.spec.mesh], placements=param.spec.placements),
            )
            for fqn, param in tensors.params.items()
        }
    result: dict[str, Held] = {}
    for held in tensors:
        if held.name in result:
            raise BridgeError(f"{held.name} appears twice on one side; give all its holders in one entry")
        result[held.name] = held
    return result
