"""The live weights of vLLM's own models as the target of a transfer: each part of a fused parameter by itself.

A fused parameter is no shard of one global tensor, but each of its parts is: q, k and v lie one after the other in
every rank's qkv. So the target's tensors are those of the Hugging Face checkpoint, each a contiguous piece of the
live parameter, with the layout that the layer's spec says. Experts stand by themselves, as in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from vllm.config import VllmConfig

from titan_bridge.engine import native_specs
from titan_bridge.engine.native_specs import Native, Part
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import DENSE, Sizes, describe, sizes_of
from titan_bridge.models import family_for
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.sharding.view import View
from titan_bridge.transfer.receiver import Target

EXPERTS = ("w13_weight", "w2_weight")


def native_target(model: nn.Module, vllm_config: VllmConfig, place: Mapping[str, Any]) -> Target:
    """What a worker with vLLM's own model receives into.

    Raises:
        BridgeError: No specs, or a parameter that a kernel keeps in another order.
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
    for fqn, tensor in model.named_parameters():
        module, native = declared.get(fqn, (None, None))
        if native is None:  # a parameter without a spec is whole on every rank
            whole = ShardingSpec(mesh=DENSE, placements=(Replicate(),) * 3)
            native = Native(spec=whole, shape=tuple(tensor.shape))
        builder.add(fqn, tensor, native, module)
    hf = vllm_config.model_config.hf_config.to_dict()

    def views() -> Sequence[View]:
        return family_for(hf).views(hf)

    return Target(
        tensors=lambda: builder.tensors,
        layout=Layout(meshes=builder.meshes, params=builder.params),
        views=views,
        unpadded=builder.unpadded,
        **place,
    )


class _Builder:
    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self.meshes: dict[str, MeshLayout] = {}
        self.params: dict[str, ParamLayout] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.unpadded: dict[str, tuple[int, ...]] = {}

    def add(self, fqn: str, tensor: torch.Tensor, native: Native, module: Any) -> None:
        """Enter the checkpoint's tensors that `tensor` is made of."""
        if native.stored != "as loaded":
            raise BridgeError(
                f"{fqn} is {native.stored} by vLLM, so slices cannot be written into it; serve with "
                "model_impl='torchtitan'"
            )
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
                self.unpadded[own] = (shape[0] - native.padding, *shape[1:])

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
        dtype = str(piece.dtype).removeprefix("torch.")
        self.params[name] = ParamLayout(spec=spec, shape=tuple(shape), dtype=dtype)
        self.tensors[name] = piece
