"""One tensor on one side of a copy: what it is, and which rank or file owns which part of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from titan_bridge.errors import BridgeError
from titan_bridge.sharding import dtensor
from titan_bridge.sharding.boxes import Box, check
from titan_bridge.sharding.layout import Layout, MeshLayout, torch_dtype

Owner = int | str | Path  # a rank, or a file


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a tensor that is a contiguous tensor of its own."""

    owner: Owner
    box: Box  # in the global tensor
    offset: int = 0
    """In a file: bytes from its start to the part, or to the `archive` that holds it; need not be aligned."""
    archive: int | None = None  # DCP: bytes of the archive of `torch.save` that holds the part

    @property
    def path(self) -> Path:
        """The file that owns it."""
        assert isinstance(self.owner, Path)
        return self.owner


@dataclass(frozen=True, kw_only=True)
class OnMesh:
    """The ranks of a mesh, each with one contiguous local tensor, as the placements say."""

    mesh: MeshLayout
    placements: tuple[dtensor.Placement, ...]


@dataclass(frozen=True, kw_only=True)
class TensorMetadata:
    """A tensor in files or on ranks: as a source, as a target, and in a checkpoint that is not yet written.
    It is either on a mesh or in chunks. Several chunks may have the same box (replicas) or overlap."""

    name: str
    shape: tuple[int, ...]  # global shape
    dtype: torch.dtype  # in storage
    chunks: tuple[Chunk, ...] = ()
    on: OnMesh | None = None

    def __post_init__(self) -> None:
        if self.on is not None:
            check(self.on.placements, self.shape, self.on.mesh.shape)
            return
        whole = Box.whole(self.shape)
        for chunk in self.chunks:
            if chunk.box.ndim != len(self.shape) or not whole.contains(chunk.box):
                where = f"{self.name}: chunk {chunk.box} of {chunk.owner}"
                raise BridgeError(f"{where} is not inside shape {self.shape}")

    @classmethod
    def whole(
        cls, name: str, shape: tuple[int, ...], dtype: torch.dtype, *owners: Owner, offset: int = 0
    ) -> TensorMetadata:
        """A tensor that each of `owners` has in full, as a Hugging Face file has (from byte `offset` on)."""
        box = Box.whole(shape)
        chunks = tuple(Chunk(owner=owner, box=box, offset=offset) for owner in owners)
        return cls(name=name, shape=tuple(shape), dtype=dtype, chunks=chunks)

    @property
    def nbytes(self) -> int:
        """Bytes of the global tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def owners(self) -> tuple[Owner, ...]:
        """One for each position on the mesh, or for each chunk."""
        return self.on.mesh.ranks if self.on else tuple(chunk.owner for chunk in self.chunks)


def by_name(tensors: Layout | Iterable[TensorMetadata]) -> dict[str, TensorMetadata]:
    """The tensors of one side. Raises BridgeError when a name appears twice, and for a tensor that nobody owns."""
    result: dict[str, TensorMetadata] = {}
    if isinstance(tensors, Layout):
        for fqn, param in tensors.params.items():
            on = OnMesh(mesh=tensors.meshes[param.spec.mesh], placements=param.spec.placements)
            dtype = torch_dtype(param.dtype)
            result[fqn] = TensorMetadata(name=fqn, shape=param.shape, dtype=dtype, on=on)
        return result
    for tensor in tensors:
        if not tensor.owners:
            raise BridgeError(f"{tensor.name}: no owner given; name at least one rank or file")
        if tensor.name in result:
            raise BridgeError(f"{tensor.name} appears twice on one side; give all its owners in one entry")
        result[tensor.name] = tensor
    return result
