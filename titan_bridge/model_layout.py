"""Where every parameter of a model lives, computed from the declarations in ``parallelize/`` alone.

The model is built without memory; no process group, no device and no second process are needed, at any size.
The result is what TorchTitan's ``parallelize`` (and ``fully_shard`` on top of it) gives the same model on
real ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import spmd_types as spmd
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import SpmdLayout

from titan_bridge.errors import BridgeError
from titan_bridge.mesh import (
    DENSE,
    SPARSE,
    Sizes,
    check_divides,
    describe,
    in_order,
    mesh_axes,
    on_stages,
    padded_vocab,
    shard_axis,
)
from titan_bridge.models import family_for, family_of
from titan_bridge.models.build import build_on_meta
from titan_bridge.parallelize import ShardingRules
from titan_bridge.policy.layers import split
from titan_bridge.policy.schema import NO_POLICY, Policy
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout, dtype_name
from titan_bridge.sharding.spec import ShardingSpec

Dense = Literal["replicate", "shard"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter or persistent buffer: global shape, storage dtype and layout.

    ``spec.placements`` has one entry for every axis of its mesh; an axis of size 1 is always ``Replicate``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: ShardingSpec
    is_buffer: bool = False


def specs(
    model: Decoder.Config | Mapping[str, Any],
    sizes: Sizes,
    dense: Dense = "replicate",
    *,
    dtype: torch.dtype | None = None,
    expert_bias: bool = False,
    policy: Policy | None = NO_POLICY,
) -> dict[str, ParamSpec]:
    """FQN to layout of every parameter and persistent buffer, in the model's order.

    Args:
        model: A TorchTitan config tree (left as it is), or a parsed config.json, whose vocabulary is then
            padded to a multiple of tp.
        sizes: Parallel degrees.
        dense: ``"replicate"``: every dp rank holds all of its tp or ep slice, as in serving. ``"shard"``: the
            fsdp and efsdp axes shard, too, as in training.
        dtype: Of the parameters; else the dtype that config.json states, else float32.
        expert_bias: With TorchTitan's load-balancing buffers, which config.json does not know; a config tree says
            for itself whether it has them.
        policy: How an engine splits each layer. None: every layer as `sizes` say, as TorchTitan trains.

    Returns:
        A tied head is not listed: its one parameter is ``tok_embeddings.weight``.

    Raises:
        BridgeError: Sizes that do not divide, a model of no known family, a parameter without a declared
            sharding.
    """
    if dense not in ("replicate", "shard"):
        raise BridgeError(f"dense={dense!r} is not a layout; allowed: replicate, shard")
    if isinstance(model, Mapping):
        family = family_for(model)
        config = family.model_config(model, expert_bias=expert_bias)
        rows = padded_vocab(config.vocab_size, sizes)
        if rows != config.vocab_size:
            config = family.model_config(model, padded_vocab=rows, expert_bias=expert_bias)
        dtype = dtype or stated_dtype(model)
    else:
        family, config = family_of(model), copy.deepcopy(model)
    if policy is not None:
        sizes = split(policy, family, config, sizes).sizes
    check_divides(config, sizes, narrows=policy is not None and family.takes_policy)
    rules = family.sharding
    rules.set_sharding(config, enable_ep=sizes.ep > 1)
    return specs_of_module(build_on_meta(config, dtype=dtype or torch.float32), rules, sizes, dense)


def layout(
    model: Decoder.Config | Mapping[str, Any],
    sizes: Sizes,
    dense: Dense = "replicate",
    *,
    dtype: torch.dtype | None = None,
    expert_bias: bool = False,
    policy: Policy | None = NO_POLICY,
) -> Layout:
    """`specs` with the meshes that they name: what `titan-bridge inspect --json` prints."""
    params = specs(model, sizes, dense, dtype=dtype, expert_bias=expert_bias, policy=policy)
    return as_layout(params, sizes, parallelism=policy.to_dict() if policy else None)


def as_layout(
    params: Mapping[str, ParamSpec], sizes: Sizes, *, parallelism: Mapping[str, Any] | None = None
) -> Layout:
    """The layout of `params` on meshes of `sizes`; only meshes that a parameter lives on are in it.

    `parallelism` is the policy behind it, as plain tables.

    Raises:
        BridgeError: Pipeline stages of which `sizes` do not say how many layers each has.
    """
    if sizes.pp > 1 and not sizes.stages:
        raise BridgeError(f"pp={sizes.pp}: which stage holds which layer is not known here; allowed: 1")
    used = {param.spec.mesh for param in params.values()}
    return Layout(
        meshes={name: _mesh(name, sizes) for name in in_order(used)},
        params={
            fqn: ParamLayout(spec=param.spec, shape=param.shape, dtype=dtype_name(param.dtype))
            for fqn, param in params.items()
        },
        parallelism=parallelism,
    )


def _mesh(name: str, sizes: Sizes) -> MeshLayout:
    mesh = describe(name, sizes)
    return MeshLayout(axes=mesh.axes, shape=mesh.shape, ranks=mesh.flat_ranks())


def specs_of_module(
    model: nn.Module, rules: ShardingRules, sizes: Sizes, dense: Dense = "replicate"
) -> dict[str, ParamSpec]:
    """The same for a model that is built but not yet parallelised, so that its shapes are the global ones.

    Buffers of modules that are not TorchTitan's, such as an engine's attention, are none of the model's.
    """
    result: dict[str, ParamSpec] = {}
    seen: set[int] = set()
    tied = bool(getattr(model, "enable_weight_tying", False))
    for prefix, module in model.named_modules():
        persistent = {
            name: tensor
            for name, tensor in module._buffers.items()
            if tensor is not None
            and name not in module._non_persistent_buffers_set
            and isinstance(module, Module)
        }
        tensors = {
            name: tensor for name, tensor in module._parameters.items() if tensor is not None
        } | persistent
        for name, tensor in tensors.items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            fqn = f"{prefix}.{name}" if prefix else name
            declared: Any = getattr(module, "_sharding_config", None)
            layout = declared.state_shardings.get(name) if declared is not None else None
            if layout is None:
                raise BridgeError(
                    f"{fqn} has no declared sharding; declare it in parallelize/'s file of this family"
                )
            result[fqn] = ParamSpec(
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                spec=_spec(
                    fqn,
                    tuple(tensor.shape),
                    layout,
                    rules,
                    sizes.at(prefix),
                    dense,
                    is_buffer=name in persistent,
                    stages=sizes.stages_of(fqn, tied=tied),
                ),
                is_buffer=name in persistent,
            )
    return result


def _spec(
    fqn: str,
    shape: tuple[int, ...],
    layout: SpmdLayout,
    rules: ShardingRules,
    sizes: Sizes,
    dense: Dense,
    *,
    is_buffer: bool,
    stages: tuple[int, ...],
) -> ShardingSpec:
    """What TorchTitan declares for tp and ep, and the fsdp axis on top of it; `sizes` are those of the module."""
    types = {axis.value: kind for axis, kind in layout.per_axis_spmd_types().items()}
    on_tp = isinstance(types.get("tp"), spmd.Shard) and sizes.tp > 1
    # What tp does not shard has no need of a subdivided axis.
    mesh = SPARSE if "ep" in types else sizes.dense_mesh if on_tp else DENSE
    placements: dict[str, Placement] = {}
    for axis in mesh_axes(mesh):
        dim = getattr(types.get(axis), "dim", None)
        shards = dim is not None and sizes.axis(axis) > 1
        placements[axis] = Shard(dim % len(shape)) if shards else Replicate()
    over = shard_axis(mesh)
    # FSDP shards parameters only; a buffer keeps its declared layout.
    if dense == "shard" and sizes.axis(over) > 1 and not is_buffer:
        chosen = rules.shard_placement_fn(fqn, shape, sizes)
        assert (chosen.mesh == SPARSE) == (mesh == SPARSE), (
            f"{fqn} is declared on the {mesh} mesh, shard_placement_fn says {chosen.mesh}"
        )
        placements[over] = placement = _sharded_on_top(chosen.dim, placements, sizes)
        inner = placement.split_factor if isinstance(placement, _StridedShard) else 1
        if chosen.dim and (left := shape[chosen.dim] // inner) % sizes.axis(over):
            raise BridgeError(
                f"{fqn}: FSDP cuts dim {chosen.dim} evenly only, and {over}={sizes.axis(over)} does not "
                f"divide {left}; allowed: a divisor of it, or dense weights replicated"
            )
    copies = (Replicate(),) if len(stages) > 1 else ()
    return ShardingSpec(mesh=on_stages(mesh, stages), placements=(*copies, *placements.values()))


def _sharded_on_top(dim: int, placements: Mapping[str, Placement], sizes: Sizes) -> Placement:
    """FSDP cuts what tp or ep left, so where one of them shards the same dim its slices are strided."""
    inner = 1
    for axis, placement in placements.items():
        if isinstance(placement, Shard) and placement.dim == dim:
            inner *= sizes.axis(axis)
    return _StridedShard(dim, split_factor=inner) if inner > 1 else Shard(dim)


def stated_dtype(hf: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that config.json states for the weights.

    Raises:
        BridgeError: It states another dtype than float32, float16 or bfloat16.
    """
    stated = hf.get("dtype") or hf.get("torch_dtype")
    if stated is None:
        return None
    dtype = _DTYPES.get(str(stated).removeprefix("torch."))
    if dtype is None:
        raise BridgeError(f"dtype={stated!r} in config.json is not supported; allowed: {', '.join(_DTYPES)}")
    return dtype
