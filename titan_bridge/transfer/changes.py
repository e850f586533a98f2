"""Which elements of a trainer's sharded parameters changed, found bit by bit on each rank's own shard.

Nothing is gathered: a rank compares its local tensors and reports what it owns of the changes in global
coordinates. Of the replicas of a shard each reports a part, so that together the ranks report every change once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.distributed.tensor import Replicate

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.boxes import dim_segments
from titan_bridge.sharding.layout import MeshLayout
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.transfer.source import Tensors, layout_of, local_of
from titan_bridge.transfer.sparse import Patch

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK = 1 << 24
"""Elements compared at a time: bounds the memory of the comparison."""


class Snapshot:
    """A rank's local tensors as they were.

    Args:
        tensors: DTensors and tensors by name (`TensorSource.tensors()`).
        dtypes: Keep tensors of these names in these dtypes, and compare in them. With the engine's (see
            `Trainer.snapshot`) a float32 master of a bfloat16 engine takes half the memory, and the changes that are
            found are exactly those that the engine would see.
    """

    def __init__(self, tensors: Tensors, *, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        self.local = {}
        for name, tensor in tensors.items():
            local = local_of(tensor)
            self.local[name] = local.to((dtypes or {}).get(name, local.dtype), copy=True)

    def update(self, tensors: Tensors) -> None:
        """Take the tensors as they are now, in the memory that is there."""
        for name, tensor in tensors.items():
            self.local[name].copy_(local_of(tensor))


def changed(before: Snapshot | Tensors, after: Tensors, *, rank: int) -> list[Patch]:
    """Patches that turn `before` into `after`: this rank's part of them, sorted, in global coordinates.

    Args:
        before: A snapshot, or tensors that share no memory with `after`.
        after: DTensors and tensors by name.
        rank: This trainer rank, in the numbering of the DTensors' meshes.

    Returns:
        A patch for each tensor of which this rank reports something. Values are those of `after`, in the dtype
        of the snapshot. NaNs and signed zeros count by their bits.

    Raises:
        BridgeError: Names, local shapes or dtypes that differ.
    """
    old = before if isinstance(before, Snapshot) else None
    if old is None:
        assert not isinstance(before, Snapshot)
        locals_ = {name: local_of(tensor) for name, tensor in before.items()}
    else:
        locals_ = old.local
    if set(locals_) != set(after):
        odd = sorted(set(locals_) ^ set(after))
        raise BridgeError(f"{odd[0]} is on one side only ({len(odd)} such tensors); take the snapshot anew")
    layout = layout_of(after, rank)
    patches = []
    for name, tensor in after.items():
        new = local_of(tensor)
        if new.shape != locals_[name].shape or (old is None and new.dtype != locals_[name].dtype):
            raise BridgeError(
                f"{name} was {locals_[name].dtype} {tuple(locals_[name].shape)} and is {new.dtype} {tuple(new.shape)}"
            )
        param = layout.params[name]
        found, values = _differences(locals_[name], new)
        if not len(found):
            continue
        mesh = layout.meshes[param.spec.mesh]
        flat = _global(found, param.shape, param.spec, mesh, rank)
        share, shares = _share(param.spec, mesh, rank)
        if shares > 1:
            mine = flat % shares == share
            flat, values = flat[mine], values[mine]
        if len(flat):
            patches.append(Patch(name=name, indices=flat, values=values))
    return patches


def _differences(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat local positions that differ, and their new values in the dtype of the old ones."""
    old, new = old.reshape(-1), new.reshape(-1)
    positions, values = [], []
    for first in range(0, len(new), BLOCK):
        b = new[first : first + BLOCK].to(old.dtype)
        a = old[first : first + BLOCK]
        bits = _BITS[b.element_size()]
        at = (a.view(bits) != b.view(bits)).nonzero(as_tuple=True)[0]
        positions.append(at + first)
        values.append(b[at])
    if not positions:
        return torch.zeros(0, dtype=torch.int64), new
    return torch.cat(positions), torch.cat(values)


def _global(
    local: torch.Tensor, shape: tuple[int, ...], spec: ShardingSpec, mesh: MeshLayout, rank: int
) -> torch.Tensor:
    """Flat positions in the local tensor as flat positions in the global one."""
    coordinate = mesh.coordinate(rank)
    assert coordinate is not None, "layout_of has checked it"
    if not len(local):
        return local
    result, stride, rest = torch.zeros_like(local), 1, local
    dims = dim_segments(spec.placements, shape, mesh.shape, coordinate)
    for dim in reversed(range(len(shape))):
        size = sum(b - a for a, b, _ in dims[dim])
        outer = torch.div(rest, size, rounding_mode="floor")
        index = rest - outer * size
        if dims[dim] != ((0, shape[dim], 0),):
            starts = torch.tensor([at for _, _, at in dims[dim]], device=local.device)
            shifts = torch.tensor([a - at for a, _, at in dims[dim]], device=local.device)
            index = index + shifts[torch.searchsorted(starts, index, right=True) - 1]
        result += index * stride
        stride *= shape[dim]
        rest = outer
    return result


def _share(spec: ShardingSpec, mesh: MeshLayout, rank: int) -> tuple[int, int]:
    """(which replica of its shard this rank is, how many there are)."""
    coordinate = mesh.coordinate(rank)
    assert coordinate is not None, "layout_of has checked it"
    share, shares = 0, 1
    for placement, size, at in zip(spec.placements, mesh.shape, coordinate, strict=True):
        if isinstance(placement, Replicate):
            share, shares = share * size + at, shares * size
    assert shares <= math.prod(mesh.shape)
    return share, shares


def apply_to(tensors: Mapping[str, torch.Tensor], patches: list[Patch]) -> None:
    """Write patches into whole tensors, in place: what an update does to one that is not sharded."""
    for patch in patches:
        flat = tensors[patch.name].view(-1)
        flat[patch.indices.long()] = patch.values.to(flat.dtype)
