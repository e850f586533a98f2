"""The live weights of vLLM's own models as the target of a transfer: each part of a fused parameter by itself.

A fused parameter is no shard of one global tensor, but each of its parts is: q, k and v lie one after the other in
every rank's qkv. So the target's tensors are those of the Hugging Face checkpoint, each a contiguous piece of the
live parameter, with the layout that the layer's spec says. Experts stand by themselves, as in the checkpoint.

A layer that cannot be written slice by slice (quantized, or repacked for a kernel) gets the checkpoint's tensors whole
on every worker, and vLLM's own layerwise reload makes of them what it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from titan_bridge.engine.log import logger_of
from titan_bridge.engine.native import specs as native_specs
from titan_bridge.engine.native.layers import Native, Part
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import DENSE, Sizes, describe, sizes_of
from titan_bridge.models import family_for
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout, dtype_name
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.sharding.view import View
from titan_bridge.transfer.target import Target

logger = logger_of(__name__)

EXPERTS = ("w13_weight", "w2_weight")


def native_target(model: nn.Module, vllm_config: VllmConfig, place: Mapping[str, Any]) -> Target:
    """What a worker with vLLM's own model receives into.

    Raises:
        BridgeError: No specs, or a layer that cannot be described of a model whose tensors are not known.
    """
    if not native_specs.is_declared(model):
        raise BridgeError(
            f"{type(model).__name__} carries no specs, which weight transfer 'titan' needs; add "
            "additional_config={'titan': {'attach_specs': true}}"
        )
    sizes = sizes_of(vllm_config.parallel_config, dist.get_world_size())
    builder = _Builder(sizes)
    declared = {
        f"{prefix}.{name}": (module, native)
        for prefix, module, name, native in native_specs.declared_in(model)
    }
    others = {prefix: module for prefix, module, _ in native_specs.undescribed_in(model)}
    inside = tuple(f"{prefix}." for prefix in others)
    for fqn, tensor in model.named_parameters():
        if fqn.startswith(inside):
            continue
        module, native = declared.get(fqn, (None, None))
        if native is None:  # a parameter without a spec is whole on every rank
            whole = ShardingSpec(mesh=DENSE, placements=(Replicate(),) * 3)
            native = Native(spec=whole, shape=tuple(tensor.shape))
        builder.add(fqn, tensor, native, module)
    hf = vllm_config.model_config.hf_config.to_dict()

    def views() -> Sequence[View]:
        family = family_for(hf)
        # Whichever names the trainer has; most views are the same in both.
        return tuple(dict.fromkeys((*family.views(hf), *family.views(hf, fused_qkv=False))))

    if others:
        claims = tuple(_claims(model, prefix, module) for prefix, module in others.items())
        builder.take_whole(family_for(hf).views(hf), claims, vllm_config.model_config.dtype)
        for prefix, module, reason in native_specs.undescribed_in(model):
            logger.info("%s (%s) is updated through load_weights: %s", prefix, type(module).__name__, reason)
    logger.info("weight transfer: %s", builder.coverage())
    return Target(
        whole=builder.whole,
        load=_Reload(model, tuple(others.values()), vllm_config.model_config),
        tensors=lambda: builder.tensors,
        layout=Layout(meshes=builder.meshes, params=builder.params),
        views=views,
        unpadded=builder.unpadded,
        **place,
    )


def _claims(model: nn.Module, prefix: str, module: Any) -> tuple[str, ...]:
    """How the checkpoint's names of a layer's tensors begin."""
    if isinstance(module, RoutedExperts):
        return (f"{module.layer_name}.",)
    parent, _, last = prefix.rpartition(".")
    packed: Any = getattr(model, "packed_modules_mapping", None) or {}
    parts = packed.get(last, ())
    return tuple(f"{parent}.{part}." for part in parts) or (f"{prefix}.",)


class _Reload:
    """Loads whole tensors of the checkpoint into a few layers, in place, as vLLM's own backends do."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], config: ModelConfig) -> None:
        self._model, self._layers, self._config = model, layers, config

    @torch.no_grad()
    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for layer in self._layers:
            initialize_layerwise_reload(layer)
            if current_platform.is_cpu() and isinstance(layer, RoutedExperts):
                # vLLM 0.32 packs experts for its CPU kernel only where it makes the kernel, too, so not in a reload
                # (`unquantized_fused_moe_method.py`, `_setup_kernel`): their weights would stay unpacked.
                layer.quant_method.moe_kernel = None
        self._model.load_weights(tensors.items())  # type: ignore[operator]
        for layer in self._layers:
            finalize_layerwise_reload(layer, self._config)


class _Builder:
    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self.meshes: dict[str, MeshLayout] = {}
        self.params: dict[str, ParamLayout] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.unpadded: dict[str, int] = {}
        self.whole: dict[str, torch.dtype] = {}

    def take_whole(
        self, views: Sequence[View], claims: Sequence[tuple[str, ...]], dtype: torch.dtype
    ) -> None:
        """Enter the checkpoint's tensors whose names begin with one of the claims, whole on every worker."""
        mesh = describe(DENSE, self._sizes, rank=dist.get_rank())
        self.meshes["whole"] = MeshLayout.make(mesh.axes, mesh.shape, mesh.flat_ranks())
        spec = ShardingSpec(mesh="whole", placements=(Replicate(),) * len(mesh.axes))
        for claim in claims:
            found = [view for view in views if view.name.startswith(claim)]
            if not found:
                raise BridgeError(f"no tensor of the checkpoint is known for {claim[0].rstrip('.')}")
            for view in found:
                self.whole[view.name] = dtype
                self.params[view.name] = ParamLayout(spec=spec, shape=view.shape, dtype=dtype_name(dtype))

    def coverage(self) -> str:
        """What an update brings to this worker, in bytes."""
        slices = sum(tensor.nbytes for tensor in self.tensors.values())
        whole = sum(math.prod(self.params[name].shape) * dtype.itemsize for name, dtype in self.whole.items())
        share = 100 * slices / max(slices + whole, 1)
        return f"{slices} bytes in slices, {whole} bytes of whole tensors through load_weights ({share:.1f} % slices)"

    def add(self, fqn: str, tensor: torch.Tensor, native: Native, module: Any) -> None:
        """Enter the checkpoint's tensors that `tensor` is made of."""
        tensor = tensor.detach()
        for part, piece, size in self._parts(tensor, native):
            shape = (*native.shape[: native.dim], size, *native.shape[native.dim + 1 :])
            if fqn.rpartition(".")[2] in EXPERTS:
                self._experts(part.name if part else module.ckpt_down_proj_name, piece, shape, native, module)
                continue
            prefix, _, name = fqn.rpartition(".")
            own = f"{prefix.rpartition('.')[0]}.{part.name}.{name}" if part else fqn
            self._enter(own, piece, shape, native.spec, part.replicas if part else 1)
            if native.padding:
                self.unpadded[own] = shape[0] - native.padding

    def _parts(self, tensor: torch.Tensor, native: Native) -> Iterator[tuple[Part | None, torch.Tensor, int]]:
        """(part, its piece of the local tensor, its global size along the fused dim)."""
        if not native.parts:
            yield None, tensor, native.shape[native.dim]
            return
        total = sum(part.size * part.replicas for part in native.parts)
        at = 0
        for part in native.parts:
            rows = tensor.shape[native.dim] * part.size * part.replicas // total
            yield part, tensor.narrow(native.dim, at, rows), part.size
            at += rows

    def _experts(
        self, part: str, piece: torch.Tensor, shape: tuple[int, ...], native: Native, module: Any
    ) -> None:
        """One tensor an expert: with expert parallelism a run of experts lies on each ep rank, else all on all."""
        mesh = describe(native.spec.mesh, self._sizes, rank=dist.get_rank())
        sharded = [
            axis for axis, p in enumerate(native.spec.placements) if isinstance(p, Shard) and p.dim == 0
        ]
        flat = MeshLayout.make(mesh.axes, mesh.shape, mesh.flat_ranks())
        each = shape[0] // math.prod(mesh.shape[axis] for axis in sharded)
        first = 0
        for axis in sharded:
            coordinate = flat.coordinate(dist.get_rank())
            assert coordinate is not None, "this rank is on its mesh"
            first = first * mesh.shape[axis] + coordinate[axis]
        for local in range(each):
            name = f"{module.layer_name}.{first * each + local}.{part}.weight"
            placements = [p for axis, p in enumerate(native.spec.placements) if axis not in sharded]
            placements = [Shard(p.dim - 1) if isinstance(p, Shard) else p for p in placements]
            ranks = flat.array
            for axis in reversed(sharded):
                ranks = ranks.take(first % mesh.shape[axis], axis=axis)
            axes = tuple(axis for i, axis in enumerate(mesh.axes) if i not in sharded)
            key = f"{'.'.join(axes)}@{','.join(map(str, ranks.reshape(-1)))}"
            self.meshes[key] = MeshLayout.make(axes, ranks.shape, ranks)
            self._write(name, piece[local], shape[1:], ShardingSpec(mesh=key, placements=tuple(placements)))

    def _enter(
        self, name: str, piece: torch.Tensor, shape: tuple[int, ...], spec: ShardingSpec, replicas: int
    ) -> None:
        """A tensor on one of the named meshes; its last axis is split where neighbours hold the same slice."""
        mesh = describe(spec.mesh, self._sizes, rank=dist.get_rank())
        axes, sizes, placements = mesh.axes, mesh.shape, spec.placements
        if replicas > 1:
            axes = (*axes, "replica")
            sizes = (*sizes[:-1], sizes[-1] // replicas, replicas)
            placements = (*placements, Replicate())
        key = f"{spec.mesh}/{replicas}"
        self.meshes[key] = MeshLayout.make(axes, sizes, mesh.flat_ranks())
        self._write(name, piece, shape, ShardingSpec(mesh=key, placements=placements))

    def _write(self, name: str, piece: torch.Tensor, shape: tuple[int, ...], spec: ShardingSpec) -> None:
        self.params[name] = ParamLayout(spec=spec, shape=tuple(shape), dtype=dtype_name(piece.dtype))
        self.tensors[name] = piece
