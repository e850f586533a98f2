"""What a trainer rank holds: a TorchTitan model, or any state dict of DTensors and tensors.

Nothing is gathered. A DTensor says by itself which part of the global tensor lies here; a plain tensor is held
whole by this rank. Ranks may hold different tensors (pipeline stages).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import _StridedShard

from titan_bridge.errors import BridgeError
from titan_bridge.models.peft import LORA
from titan_bridge.sharding.boxes import axes_of, fsdp_is_exact
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout, dtype_name
from titan_bridge.sharding.spec import ShardingSpec, placements_of

_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")
Tensors = Mapping[str, torch.Tensor]


class TensorSource:
    """The tensors of one trainer rank, read anew for every update.

    Args:
        tensors: A module (parameters and persistent buffers, tied ones once, under TorchTitan's FQNs), a mapping
            of names to DTensors or tensors, or a function that returns one, such as `model.state_dict`. Names are
            TorchTitan's FQNs, with one wqkv or with wq, wk and wv, or Hugging Face's.
        rank: This trainer rank: the number that the DTensors' meshes use.
        filter: Says of a name, as given, whether the tensor is sent; else all are. A frozen tower may stay at home.
        rename: Gives a tensor the name under which the engine knows it.
    """

    def __init__(
        self,
        tensors: nn.Module | Tensors | Callable[[], Tensors],
        *,
        rank: int,
        filter: Callable[[str], bool] | None = None,
        rename: Callable[[str], str] | None = None,
    ) -> None:
        self._tensors, self._filter, self._rename = tensors, filter, rename
        self._endings: tuple[str, ...] = ("",)
        self.rank = rank

    def adapter(self) -> TensorSource:
        """The same, but nothing except the matrices of a LoRA adapter."""
        only = copy.copy(self)
        only._endings = LORA
        return only

    def scaling(self) -> float | None:
        """What a LoRA model of TorchTitan's multiplies its products by, if it is one. BridgeError for several."""
        modules = self._tensors.modules() if isinstance(self._tensors, nn.Module) else ()
        found: set[Any] = {module._lora_scaling for module in modules if hasattr(module, "_lora_scaling")}
        if len(found) > 1:
            raise BridgeError(f"the model's adapters are scaled by {sorted(found)}; an engine has one scale")
        return found.pop() if found else None

    def reshard(self) -> None:
        """Let a model under FSDP2 hold its shards: after a forward without a backward its root holds whole tensors.

        To be called where no forward or backward runs meanwhile; one that is still to come gathers them anew.
        """
        for module in self._tensors.modules() if isinstance(self._tensors, nn.Module) else ():
            if isinstance(module, FSDPModule):
                module.reshard()

    def tensors(self) -> dict[str, torch.Tensor]:
        """DTensors and tensors by name, as they are now; wrappers of torch.compile and checkpointing leave no trace.

        BridgeError for two tensors whose names are one without the wrappers.
        """
        if isinstance(self._tensors, nn.Module):
            given = _tensors_of(self._tensors)
        else:
            given = self._tensors() if callable(self._tensors) else self._tensors
        result: dict[str, torch.Tensor] = {}
        for name, tensor in given.items():
            clean = _WRAPPERS.sub("", name)
            if (self._filter and not self._filter(name)) or not clean.endswith(self._endings):
                continue
            if result.setdefault(self._rename(clean) if self._rename else clean, tensor) is not tensor:
                raise BridgeError(f"{name} is given a second time, without its wrapper or with a new name")
        return result

    def local(self) -> dict[str, torch.Tensor]:
        """The local tensors by name, detached."""
        return {name: local_of(tensor) for name, tensor in self.tensors().items()}

    def signature(self) -> dict[str, tuple]:
        """What the layout depends on, quickly: equal as long as `layout()` says the same."""
        named, more = self.tensors().items(), ("placements", "device_mesh")
        return {name: (t.shape, t.dtype, *(getattr(t, each, None) for each in more)) for name, t in named}

    def layout(self) -> Layout:
        """Of the tensors that this rank holds. BridgeError for a local tensor that is not what its placements say."""
        meshes: dict[str, MeshLayout] = {}
        params: dict[str, ParamLayout] = {}
        for name, tensor in self.tensors().items():
            if isinstance(tensor, DTensor):
                on = tensor.device_mesh
                axes = on.mesh_dim_names or tuple(f"axis{i}" for i in range(on.ndim))
                mesh = MeshLayout.make(axes, tuple(on.mesh.shape), on.mesh.numpy())
            else:
                mesh = MeshLayout.make(("rank",), (1,), [self.rank])
            key = f"{'.'.join(mesh.axes)}@{','.join(map(str, mesh.ranks))}"
            meshes[key] = mesh
            try:
                placements = placements_of(tensor) if isinstance(tensor, DTensor) else (Replicate(),)
                spec = ShardingSpec(mesh=key, placements=placements)
                _check_local(tensor, spec, mesh, self.rank)
            except BridgeError as error:
                raise BridgeError(f"{name}: {error}") from None
            params[name] = ParamLayout(spec=spec, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype))
        return Layout(meshes=meshes, params=params)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, detached; shares memory with the parameter."""
    # A DTensor's own detach goes through its dispatch, for each parameter of each update.
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name."""
    buffers = {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return dict(model.named_parameters()) | buffers


def _check_local(tensor: torch.Tensor, spec: ShardingSpec, mesh: MeshLayout, rank: int) -> None:
    coordinate = mesh.coordinate(rank)
    if coordinate is None:
        raise BridgeError(f"trainer rank {rank} is not on its mesh {mesh} of ranks {mesh.ranks}")
    local = tuple(local_of(tensor).shape)
    if local != (want := spec.local_shape(tensor.shape, mesh.shape, coordinate)):
        raise BridgeError(f"the local tensor has shape {local}; {spec} says {want}")
    for axis, placement in enumerate(spec.placements):
        if not isinstance(placement, _StridedShard):
            continue
        size = tensor.shape[placement.dim]
        inner = [mesh.shape[other] for other in axes_of(spec.placements, placement.dim) if other > axis]
        if len(inner) == 1 and not fsdp_is_exact(size, inner[0], mesh.shape[axis]):
            why = "its placements do not say which rows lie where; choose sizes that divide the rows"
            raise BridgeError(f"{size} rows on fsdp={mesh.shape[axis]} over {inner[0]} shards: {why}")
