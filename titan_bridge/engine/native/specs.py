"""ShardingSpecs on vLLM's own models, declared by the parallel layers that they are built of.

Whatever the model, its sharded weights sit in vLLM's parallel primitives (column, row, merged and qkv linears,
vocabulary embedding and head, routed experts), and each of these knows its sizes. So nothing here knows a
model's name. A layer that shards in a way that placements cannot say is refused by name: a parameter without
a spec means that every rank holds the whole of it. (A model that cuts a parameter of its own, outside the
primitives, escapes this; `verify` finds it.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform

from titan_bridge.engine.native.layers import Native, natives_of
from titan_bridge.engine.options import TRANSFER_BACKEND
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes, mesh_axes, sizes_of
from titan_bridge.sharding.boxes import chunk
from titan_bridge.sharding.spec import attach, attach_module

_DECLARED = "_titan_native_specs"
"""Attribute of a module: parameter name -> Native."""
_UNDESCRIBED = "_titan_undescribed"
"""Attribute of a module: why placements cannot say how it is sharded."""


def declare(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Attach specs to every sharded parameter of `model`, whose weights are not post-processed yet.

    Where weights come by transfer "titan", a layer that cannot be described is left without, and gets whole tensors.

    On the CPU backend this also leaves linear weights where they are: vLLM would move them into a oneDNN copy and
    leave an empty parameter behind, which nobody could read or update.

    Raises:
        BridgeError: A layer whose sharding placements cannot say, or a quantized one, by name.
    """
    transfer = getattr(vllm_config.weight_transfer_config, "backend", None) == TRANSFER_BACKEND
    sizes = sizes_of(vllm_config.parallel_config, dist.get_world_size())
    packed: Any = getattr(model, "packed_modules_mapping", None) or {}
    for prefix, module in model.named_modules():
        if isinstance(module, LinearBase) and current_platform.is_cpu():
            module._cpu_skip_gemm_dispatch = True  # vLLM's own switch (UnquantizedLinearMethod)
        names = packed.get(prefix.rpartition(".")[2], ())
        try:
            declared = natives_of(module, sizes, names)
            if declared is not None:
                _attach(module, declared, sizes)
        except BridgeError as error:
            if not transfer:
                raise BridgeError(f"attach_specs: {prefix} ({type(module).__name__}): {error}") from None
            module.__dict__[_UNDESCRIBED] = str(error)


def _attach(module: nn.Module, declared: dict[str, Native], sizes: Sizes) -> None:
    live = {name: param for name, param in module._parameters.items() if param is not None}
    if unknown := sorted(live.keys() - declared.keys()):
        raise BridgeError(f"parameter {', '.join(unknown)} is not one whose sharding is known")
    for name, param in live.items():
        native = declared[name]
        mesh_shape = [sizes.axis(axis) for axis in mesh_axes(native.spec.mesh)]
        expected = native.spec.local_shape(native.shape, mesh_shape, [0] * len(mesh_shape))
        if tuple(param.shape) != expected:
            raise BridgeError(f"{name} has local shape {tuple(param.shape)}, {expected} was expected")
        attach_module(module, name, native.spec.mesh, native.spec.placements)
    module.__dict__[_DECLARED] = {name: declared[name] for name in live}


def settle(model: nn.Module, before: dict[tuple[str, str], tuple[torch.Size, torch.Tensor]]) -> None:
    """Write down what post-processing made of the parameters; `before` is what `glimpse` gave ahead of it."""
    for prefix, module, name, native in declared_in(model):
        tensor = module._parameters.get(name)
        if tensor is None or tensor.numel() == 0:
            stored = "removed"
        else:
            shape, sample = before[prefix, name]
            same = tensor.shape == shape and torch.equal(_sample(tensor), sample)
            stored = "as loaded" if same else "repacked"
            attach(tensor, native.spec.mesh, native.spec.placements)  # the parameter may be a new one
        module.__dict__[_DECLARED][name] = replace(native, stored=stored)


def glimpse(model: nn.Module) -> dict[tuple[str, str], tuple[torch.Size, torch.Tensor]]:
    """Shape and a few elements of every declared parameter, by which `settle` sees that it was repacked."""
    return {
        (prefix, name): (tensor.shape, _sample(tensor))
        for prefix, module, name, _ in declared_in(model)
        if (tensor := module._parameters.get(name)) is not None
    }


def _sample(tensor: torch.Tensor, count: int = 1021) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    # A prime stride visits all places within a row and a tile.
    places = torch.arange(min(count, flat.numel()), device=flat.device) * 7919 % max(flat.numel(), 1)
    return flat[places].clone()


def declared_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Native]]:
    """(prefix, module, name, layout) of every declared parameter; a tied one once."""
    for prefix, module in model.named_modules():
        for name, native in module.__dict__.get(_DECLARED, {}).items():
            yield prefix, module, name, native


def undescribed_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(prefix, module, reason) of every layer into which no slices can be written."""
    for prefix, module in model.named_modules():
        if reason := module.__dict__.get(_UNDESCRIBED):
            yield prefix, module, reason
        for name, native in module.__dict__.get(_DECLARED, {}).items():
            if native.stored != "as loaded":
                yield prefix, module, f"{name} is {native.stored}"
                break


def is_declared(model: nn.Module) -> bool:
    """Whether `declare` has seen the model."""
    return next(declared_in(model), None) is not None


def cut(
    native: Native, parts: Sequence[torch.Tensor], mesh_shape: Sequence[int], coordinate: Sequence[int]
) -> torch.Tensor:
    """The local tensor of the rank at `coordinate`, cut from the global tensors of the `parts` (one, if not fused).

    Padding rows are zero. The tensors have the global shapes that the checkpoint has.
    """
    replicas = [part.replicas for part in native.parts] or [1]
    slices = []
    for tensor, count in zip(parts, replicas, strict=True):
        local = tensor
        if native.padding:
            local = torch.cat([tensor, tensor.new_zeros(native.padding, *tensor.shape[1:])])
        for placement, size, at in zip(native.spec.placements, mesh_shape, coordinate, strict=True):
            if isinstance(placement, Shard):
                dim = placement.dim
                fused = count if dim == native.dim else 1
                start, stop = chunk(local.shape[dim], size // fused, at // fused)
                local = local.narrow(dim, start, stop - start)
        slices.append(local)
    return slices[0] if len(slices) == 1 else torch.cat(slices, native.dim)


def pack(module: Any, name: str, expected: torch.Tensor) -> torch.Tensor:
    """`expected`, what a repacked parameter `name` of `module` held as loaded, in the kernel's order.

    Only vLLM's experts on the CPU backend are known; anything else comes back as it is.
    """
    kernel = getattr(module.quant_method, "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    isa = getattr(experts, "isa", None)
    if not current_platform.is_cpu() or not isinstance(isa, str):
        return expected
    live = module._parameters[name]
    padded = expected.new_zeros(live.shape)
    # vLLM pads the inner size of each half of w13, and of w2, up to what its kernel takes.
    halves = 2 if name.startswith("w13") else 1
    inner, wide = expected.shape[1] // halves, live.shape[1] // halves
    for half in range(halves):
        source = expected[:, half * inner : (half + 1) * inner]
        padded[:, half * wide : half * wide + inner, : source.shape[2]] = source
    return ops.cpu_prepack_moe_weight(padded, isa)
