"""ShardingSpecs on vLLM's own models, declared by the parallel layers that they are built of.

Whatever the model, its sharded weights sit in vLLM's parallel primitives (column, row, merged and qkv linears,
vocabulary embedding and head, routed experts), and each of these knows its sizes. So nothing here knows a
model's name. A layer that shards in a way that placements cannot say is refused by name: a parameter without
a spec means that every rank holds the whole of it. (A model that cuts a parameter of its own, outside the
primitives, escapes this; `verify` finds it.)

A fused parameter is several global tensors, its `parts`. On every rank the local tensor is one slice of each,
one after the other along one dim, and the spec is that of each part. The fused `shape` is what
`DTensor.full_tensor` would give: the local tensors of all ranks, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from titan_bridge.engine.plugin import TRANSFER_BACKEND
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import DENSE, MESH_AXES, SPARSE, Sizes, sizes_of
from titan_bridge.sharding.boxes import chunk
from titan_bridge.sharding.spec import ShardingSpec, attach, attach_module

_DECLARED = "_titan_native_specs"
"""Attribute of a module: parameter name -> Native."""
_UNDESCRIBED = "_titan_undescribed"
"""Attribute of a module: why placements cannot say how it is sharded."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the global tensors in a fused parameter."""

    name: str
    """What the checkpoint calls it ("q_proj"), else vLLM's own id of the part ("0")."""
    size: int
    """Its global size along the fused dim, padding not counted."""
    replicas: int = 1
    """How many neighbouring ranks hold the same slice: with 2 kv heads at tp=4, ranks 0 and 1 both hold head 0."""


@dataclass(frozen=True, kw_only=True)
class Native:
    """The layout of one parameter of a vLLM layer, as it is loaded."""

    spec: ShardingSpec
    shape: tuple[int, ...]
    """Global shape, padding and replicas of parts included."""
    dim: int = 0
    """The dim along which the parts lie."""
    parts: tuple[Part, ...] = ()
    """Empty when the parameter is one tensor."""
    padding: int = 0
    """Rows at the end of dim 0 that no checkpoint fills; they are zero."""
    stored: str = "as loaded"
    """What vLLM's post-processing left: "as loaded"; "repacked": the same slice, its elements in the order of a
    kernel; "removed": the parameter is empty, a kernel has a copy of its own."""


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
    packed = getattr(model, "packed_modules_mapping", None) or {}
    for prefix, module in model.named_modules():
        if isinstance(module, LinearBase) and current_platform.is_cpu():
            module._cpu_skip_gemm_dispatch = True  # vLLM's own switch (UnquantizedLinearMethod)
        for kind, natives in _PRIMITIVES:
            if isinstance(module, kind):
                names = packed.get(prefix.rpartition(".")[2], ())
                try:
                    declared = natives(module, sizes, names)
                    _attach(module, declared, sizes)
                except BridgeError as error:
                    if transfer:
                        module.__dict__[_UNDESCRIBED] = str(error)
                        break
                    raise BridgeError(f"attach_specs: {prefix} ({type(module).__name__}): {error}") from None
                break


def _attach(module: nn.Module, declared: dict[str, Native], sizes: Sizes) -> None:
    live = {name: param for name, param in module._parameters.items() if param is not None}
    if unknown := sorted(live.keys() - declared.keys()):
        raise BridgeError(f"parameter {', '.join(unknown)} is not one whose sharding is known")
    for name, param in live.items():
        native = declared[name]
        mesh_shape = [sizes.axis(axis) for axis in MESH_AXES[native.spec.mesh]]
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


# One function a primitive: module, sizes and the checkpoint's names of the parts -> parameter name -> Native.


def _column(module: Any, sizes: Sizes, names: Sequence[str]) -> dict[str, Native]:
    _unquantized(module, UnquantizedLinearMethod)
    fused: Sequence[int] = getattr(module, "output_sizes", None) or ()
    replicas = [1] * len(fused)
    if isinstance(module, QKVParallelLinear):
        replicas = [1, module.num_kv_head_replicas, module.num_kv_head_replicas]
        names = names or ("q", "k", "v")
    elif fused and not isinstance(module, MergedColumnParallelLinear):
        raise BridgeError("it is fused in a way that is not known")
    if fused and [size // module.tp_size for size in fused] != list(module.output_partition_sizes):
        raise BridgeError(f"its parts are {module.output_partition_sizes} rows, not those of {fused}")
    parts = tuple(
        Part(name=names[i] if len(names) == len(fused) else str(i), size=size // count, replicas=count)
        for i, (size, count) in enumerate(zip(fused, replicas, strict=True))
    )
    spec = _dense(_tp(module, sizes), sizes, 0)
    rows = module.output_size
    return {
        "weight": Native(spec=spec, shape=(rows, module.input_size), parts=parts),
        "bias": Native(spec=spec, shape=(rows,), parts=parts),
    }


def _row(module: Any, sizes: Sizes, names: Sequence[str]) -> dict[str, Native]:
    _unquantized(module, UnquantizedLinearMethod)
    tp = _tp(module, sizes)
    return {
        "weight": Native(spec=_dense(tp, sizes, 1), shape=(module.output_size, module.input_size)),
        "bias": Native(spec=_dense(1, sizes, 0), shape=(module.output_size,)),
    }


def _vocabulary(module: Any, sizes: Sizes, names: Sequence[str]) -> dict[str, Native]:
    _unquantized(module, UnquantizedEmbeddingMethod)
    if module.num_added_embeddings:
        raise BridgeError(f"{module.num_added_embeddings} added embeddings are interleaved with the padding")
    rows = module.num_embeddings_padded
    common = Native(
        spec=_dense(_tp(module, sizes), sizes, 0),
        shape=(rows, module.embedding_dim),
        padding=rows - module.org_vocab_size,
    )
    return {"weight": common, "bias": replace(common, shape=(rows,))}


def _experts(module: Any, sizes: Sizes, names: Sequence[str]) -> dict[str, Native]:
    _unquantized(module, UnquantizedFusedMoEMethod)
    config, parallel = module.moe_config, module.moe_config.moe_parallel_config
    count, hidden = config.num_experts, config.hidden_dim
    if parallel.use_ep:
        if (
            module.expert_placement_strategy != "linear"
            or count % parallel.ep_size
            or count != config.num_logical_experts
            or parallel.ep_size != sizes.ep
        ):
            raise BridgeError(
                f"{count} physical ({config.num_logical_experts} logical) experts placed "
                f"{module.expert_placement_strategy!r} over ep={parallel.ep_size} of {sizes}; placements can say "
                "equal runs of neighbours over dp*tp only"
            )
        columns = rows = replicated = _sparse(sizes)
        split = 1
    else:
        split = parallel.tp_size
        if split not in (1, sizes.dp * sizes.tp):
            raise BridgeError(f"cut over {split} ranks of {sizes}; allowed: 1 or dp*tp")
        columns, rows = (_flat(split, sizes, dim) for dim in (1, 2))
        replicated = _flat(1, sizes, 0)
    inner = config.intermediate_size_per_partition * split
    gated = module.ckpt_up_proj_name is not None
    parts = (Part(name=module.ckpt_gate_proj_name, size=inner),)
    if gated:
        parts += (Part(name=module.ckpt_up_proj_name, size=inner),)
    width = inner * len(parts)
    return {
        "w13_weight": Native(spec=columns, shape=(count, width, hidden), dim=1, parts=parts),
        "w13_bias": Native(spec=columns, shape=(count, width), dim=1, parts=parts),
        "w2_weight": Native(spec=rows, shape=(count, hidden, inner)),
        "w2_bias": Native(spec=replicated, shape=(count, hidden)),
    }


_PRIMITIVES: tuple[tuple[type, Callable[[Any, Sizes, Sequence[str]], dict[str, Native]]], ...] = (
    (ColumnParallelLinear, _column),  # merged and qkv linears, too
    (RowParallelLinear, _row),
    (VocabParallelEmbedding, _vocabulary),  # the head, too
    (RoutedExperts, _experts),
)


def _unquantized(module: Any, method: type) -> None:
    if not isinstance(module.quant_method, method):
        raise BridgeError(
            f"its weights are in the format of {type(module.quant_method).__name__}; allowed: unquantized"
        )


def _tp(module: Any, sizes: Sizes) -> int:
    if module.tp_size not in (1, sizes.tp):
        raise BridgeError(f"it is cut over {module.tp_size} ranks; allowed: 1 or tp={sizes.tp}")
    return module.tp_size


def _dense(tp: int, sizes: Sizes, dim: int) -> ShardingSpec:
    """Sharded over the tp axis and replicated over dp; an axis of size 1 replicates."""
    return ShardingSpec(mesh=DENSE, placements=(Replicate(), Replicate(), _on(tp, dim)))


def _flat(split: int, sizes: Sizes, dim: int) -> ShardingSpec:
    """Sharded over dp and tp as over one axis: vLLM's experts without expert parallelism."""
    over_dp, over_tp = (sizes.dp, sizes.tp) if split > 1 else (1, 1)
    return ShardingSpec(mesh=DENSE, placements=(Replicate(), _on(over_dp, dim), _on(over_tp, dim)))


def _sparse(sizes: Sizes) -> ShardingSpec:
    return ShardingSpec(mesh=SPARSE, placements=(Replicate(), Replicate(), _on(sizes.ep, 0)))


def _on(size: int, dim: int) -> Placement:
    return Shard(dim) if size > 1 else Replicate()


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
