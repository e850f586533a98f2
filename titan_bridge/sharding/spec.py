"""ShardingSpec: the layout of one parameter, and how a parameter carries it.

A spec is a plain attribute of the tensor, so `get(param)` needs no registry. It is kept by `module.to(dtype)`,
`load_state_dict`, `param.data = ...`, in-place copies and pickling. It is lost where torch builds a new Parameter:
`to_empty` and `.to` from the meta device, `load_state_dict(assign=True)`, `setattr(module, name, Parameter(...))`
(vLLM's `replace_parameter`), `copy.deepcopy` of the tensor, and every conversion of a buffer. So `attach_module(module,
name, ...)` also writes it down on the module that owns the tensor, and `get(module, name)` never goes stale.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from titan_bridge.errors import BridgeError
from titan_bridge.sharding import dtensor
from titan_bridge.sharding.boxes import Piece, Sizes, local_shape_of, pieces_of, shard_dim

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_ATTRIBUTE = "_titan_sharding_spec"
_MODULE_ATTRIBUTE = "_titan_sharding_specs"
_PLACEMENT = re.compile(r"(?P<R>R)|S\((?P<dim>\d+)\)|SS\((?P<sdim>\d+),\s*(?P<factor>[1-9]\d*)\)")


def placement_to_str(placement: dtensor.Placement) -> str:
    """`R`, `S(dim)` or `SS(dim,split_factor)`. Raises BridgeError for any other placement."""
    if isinstance(placement, dtensor.Replicate):
        return "R"
    if isinstance(placement, dtensor._StridedShard):
        return f"SS({placement.dim},{int(placement.split_factor)})"
    if isinstance(placement, dtensor.Shard):
        return f"S({placement.dim})"
    raise BridgeError(f"placement {placement!r} cannot be written; a parameter can be R, S(d) or SS(d,f)")


def placement_from_str(text: str) -> dtensor.Placement:
    """The reverse of `placement_to_str`. Raises BridgeError for any other text."""
    match = _PLACEMENT.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise BridgeError(f"placement {text!r} is not one of R, S(d), SS(d,f), for example S(0) or SS(0,2)")
    if match["R"]:
        return dtensor.Replicate()
    if match["dim"]:
        return dtensor.Shard(int(match["dim"]))
    return dtensor._StridedShard(int(match["sdim"]), split_factor=int(match["factor"]))


def placements_of(tensor: DTensor) -> tuple[dtensor.Placement, ...]:
    """The placements of a live DTensor, which are read from left to right. Raises BridgeError: its mesh axes cut a dim
    in another order (torch's `shard_order`), which placements do not say."""
    for entry in tensor._spec.shard_order or ():
        if list(entry.mesh_dims) != sorted(entry.mesh_dims):
            raise BridgeError(
                f"dim {entry.tensor_dim} is sharded over mesh axes {entry.mesh_dims} in this order (shard_order); only "
                "left to right is read: redistribute it first"
            )
    return tuple(tensor.placements)


@dataclass(frozen=True, kw_only=True)
class ShardingSpec:
    """Where a parameter lives: a named mesh and one torch placement for each axis of it.
    Example: `ShardingSpec(mesh="dense", placements=(Replicate(), _StridedShard(0, split_factor=2), Shard(0)))` on the
    mesh `(dp_replicate, fsdp, tp)`."""

    mesh: str  # name of the mesh, for example "dense" or "sparse"
    placements: tuple[dtensor.Placement, ...]
    """Replicate, Shard or _StridedShard; one for each mesh axis, read from left to right."""

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, str) or not self.mesh:
            raise BridgeError(f"mesh is {self.mesh!r}; give the name of a mesh, for example 'dense'")
        object.__setattr__(self, "placements", tuple(self.placements))
        for placement in self.placements:
            dim = 0 if isinstance(placement, dtensor.Replicate) else shard_dim(placement)
            if dim is None:
                raise BridgeError(
                    f"placement {placement!r}: a parameter can be Replicate, Shard or _StridedShard"
                )
            if dim < 0:
                raise BridgeError(
                    f"placement {placement!r} counts dims from the end; give the dim from the front"
                )

    @property
    def is_replicated(self) -> bool:
        """True when every rank of the mesh holds the whole tensor."""
        return all(isinstance(placement, dtensor.Replicate) for placement in self.placements)

    def pieces(self, shape: Sizes, mesh_shape: Sizes, coordinate: Sizes) -> tuple[Piece, ...]:
        """What the rank at `coordinate` holds of the global tensor (`shape`); see `boxes.pieces_of`."""
        return pieces_of(self.placements, shape, mesh_shape, coordinate)

    def local_shape(self, shape: Sizes, mesh_shape: Sizes, coordinate: Sizes) -> tuple[int, ...]:
        """Shape of the local tensor of the rank at `coordinate`, for a tensor of global `shape`."""
        return local_shape_of(self.placements, shape, mesh_shape, coordinate)

    def __str__(self) -> str:
        return f"{self.mesh}({', '.join(placement_to_str(placement) for placement in self.placements)})"


def attach(param: torch.Tensor, mesh: str, placements: Sequence[dtensor.Placement]) -> None:
    """Write the layout of `param` (a local tensor or a DTensor) down on it; `get` reads it back.
    Raises BridgeError for a DTensor whose `shard_order` is not left to right."""
    if hasattr(param, "placements"):
        placements_of(cast("DTensor", param))
    setattr(param, _ATTRIBUTE, ShardingSpec(mesh=mesh, placements=tuple(placements)))


def attach_module(module: nn.Module, name: str, mesh: str, placements: Sequence[dtensor.Placement]) -> None:
    """Write the layout down on the parameter or buffer `module.<name>` and on `module`, so that it outlives the tensor.
    Raises BridgeError when the module has no parameter or buffer of its own with this name."""
    tensor = _tensor(module, name)
    attach(tensor, mesh, placements)
    module.__dict__.setdefault(_MODULE_ATTRIBUTE, {})[name] = getattr(tensor, _ATTRIBUTE)


def attached(param: torch.Tensor | nn.Module, name: str | None = None) -> ShardingSpec | None:
    """Whatever was attached to a tensor, or to the tensor `name` of a module; one that only replicates, too."""
    if not isinstance(param, nn.Module):
        return getattr(param, _ATTRIBUTE, None)
    if name is None:
        raise BridgeError("name the parameter: get(module, name)")
    spec = param.__dict__.get(_MODULE_ATTRIBUTE, {}).get(name)
    return spec if spec is not None else getattr(_tensor(param, name), _ATTRIBUTE, None)


def get(param: torch.Tensor | nn.Module, name: str | None = None) -> ShardingSpec | None:
    """The layout of a tensor, or of the parameter or buffer `name` of a module.
    None means that every rank holds the whole tensor: nothing was attached, or only Replicate."""
    spec = attached(param, name)
    return None if spec is None or spec.is_replicated else spec


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    own = {n: t for n, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}
    if name not in own:
        what = f"no parameter or buffer {name!r} of its own"
        raise BridgeError(f"{type(module).__name__} has {what}; it has {sorted(own)}")
    return own[name]
