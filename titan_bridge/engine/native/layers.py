"""What vLLM's parallel layers are in placements: one function a primitive, and no model's name.

A fused parameter is several global tensors, its `parts`. On every rank the local tensor is one slice of each,
one after the other along one dim, and the spec is that of each part. The fused `shape` is what
`DTensor.full_tensor` would give: the local tensors of all ranks, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from titan_bridge.errors import BridgeError
from titan_bridge.mesh import DENSE, SPARSE, Sizes
from titan_bridge.sharding.spec import ShardingSpec


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


def natives_of(module: nn.Module, sizes: Sizes, names: Sequence[str]) -> dict[str, Native] | None:
    """The layout of each parameter of one layer; None if it is none of vLLM's parallel primitives.

    Args:
        names: What the checkpoint calls the parts of a fused parameter; empty if nobody said.

    Raises:
        BridgeError: Placements cannot say how it is sharded, or it is quantized.
    """
    for kind, natives in _PRIMITIVES:
        if isinstance(module, kind):
            return natives(module, sizes, names)
    return None


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
        if split not in (1, sizes.most_ep):
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
