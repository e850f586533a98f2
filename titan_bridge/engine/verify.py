"""Live parameters against a checkpoint, bit for bit; see `live.titan_verify_specs`.

A TorchTitan parameter is compared some rows at a time: where the KV cache has taken the device, there is no room for a
whole one. Nothing travels between ranks: each compares what it holds with what torch says that its placements mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.mapping import live_views
from titan_bridge.checkpoint.model_dir import open_named_either_way, weights_directory
from titan_bridge.engine.native import specs as native_specs
from titan_bridge.engine.native.checkpoint_tensors import CheckpointTensors
from titan_bridge.engine.native.layers import Native
from titan_bridge.mesh import Sizes, describe
from titan_bridge.model_layout import ParamSpec
from titan_bridge.sharding.boxes import shard_dim
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.sharding.view import View

SLICE_BYTES = 32 << 20
"""Most bytes of a parameter that are compared at a time, unless one row of it, or of its first factored dim, is larger.
The device has these bytes once, the host three times."""


def place(spec: ShardingSpec, sizes: Sizes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of the spec's mesh, and where this rank stands on it."""
    mesh = describe(spec.mesh, sizes, rank=dist.get_rank())
    return mesh.shape, mesh.coordinate(dist.get_rank())


def verify_titan(
    model: Any,
    live: Mapping[str, torch.Tensor],
    params: Mapping[str, ParamSpec],
    sizes: Sizes,
    directory: str,
) -> Iterator[dict[str, Any]]:
    """A finding for each of `params`, whose local tensors are `live`."""
    setup, meshes = model.setup, {}
    for name in {known.spec.mesh for known in params.values()}:
        at = describe(name, sizes, rank=dist.get_rank())
        # Without process groups, which only a gather needs.
        meshes[name] = DeviceMesh("cpu", torch.tensor(at.ranks), mesh_dim_names=at.axes, _init_backend=False)
    found = weights_directory(directory) or Path(directory)
    with open_named_either_way(found, setup.options.names, setup.family, setup.hf) as checkpoint:
        views: dict[str, list[View]] = {}
        for view in live_views(checkpoint.format, setup.family, setup.hf, setup.padded_vocab):
            if view.name in checkpoint.tensors:
                views.setdefault(view.fqn, []).append(view)
        for fqn, known in params.items():
            if fqn not in views and fqn in checkpoint.tensors:
                views[fqn] = [View.identity(fqn, fqn, known.shape)]
            parts = views.get(fqn, [])
            equal = _equal(live[fqn], known, _held(known, meshes[known.spec.mesh]), parts, checkpoint)
            missing = math.prod(known.shape) - sum(math.prod(view.shape) for view in parts)
            rows = missing // max(math.prod(known.shape[1:]), 1)
            note = f"{rows} rows of padding, zero" if rows else ""
            yield _finding(fqn, known.spec, equal, note if parts else "not in the checkpoint")


def _held(known: ParamSpec, mesh: DeviceMesh) -> list[torch.Tensor]:
    """For each dim the indices of the global parameter that this rank holds, by torch's own arithmetic."""
    held = []
    for dim, size in enumerate(known.shape):
        along = [each if shard_dim(each) == dim else Replicate() for each in known.spec.placements]
        indices = torch.arange(size).view(*(1,) * dim, size, *(1,) * (len(known.shape) - dim - 1))
        held.append(distribute_tensor(indices, mesh, along, src_data_rank=None).to_local().flatten())
    return held


def _equal(
    live: torch.Tensor,
    known: ParamSpec,
    held: list[torch.Tensor],
    views: list[View],
    checkpoint: Checkpoint,
) -> bool:
    together = math.lcm(*(view.rows for view in views))  # they are written whole
    row_bytes = together * math.prod(known.shape[1:]) * known.dtype.itemsize
    step = together * max(1, SLICE_BYTES // max(row_bytes, 1))
    for first in range(0, known.shape[0], step):
        expected = torch.zeros(min(step, known.shape[0] - first), *known.shape[1:], dtype=known.dtype)
        mine = ((held[0] >= first) & (held[0] < first + len(expected))).nonzero().flatten()
        if not len(mine):
            continue
        for view in views:
            if (box := view.part(first, len(expected))) is not None:
                # Cast once, as loading does: what is multiplied out is float32.
                external = torch.empty(box.shape, dtype=known.dtype)
                checkpoint.read_into(view.name, box, external)
                view.write(expected, external, first=first)
        for dim, indices in enumerate([held[0][mine] - first, *held[1:]]):
            if len(indices) != expected.shape[dim]:
                expected = expected.index_select(dim, indices)
        if not torch.equal(live[mine.to(live.device)].cpu(), expected):
            return False
    return True


def verify_native(
    model: nn.Module, params: Iterable[tuple[str, torch.Tensor, Native]], sizes: Sizes, directory: str
) -> Iterator[dict[str, Any]]:
    """A finding for each of `params` (name, live tensor, spec) of vLLM's own `model`; what is expected is whole on the
    host, and of routed experts that of all of them."""
    tensors, declared = CheckpointTensors(directory), {}
    for prefix, module, name, _ in native_specs.declared_in(model):
        declared[f"{prefix}.{name}"] = module
    for fqn, live, native in params:
        parts = tensors.parts(fqn, native, declared.get(fqn))
        if parts is None:
            yield _finding(fqn, native.spec, False, "not in the checkpoint under a name that is known")
            continue
        expected = native_specs.cut(native, parts, *place(native.spec, sizes)).to(live.dtype)
        note = f"{native.padding} rows of padding, zero" if native.padding else ""
        if native.stored == "repacked":
            expected, note = (
                native_specs.pack(declared[fqn], fqn.rpartition(".")[2], expected),
                "repacked by vLLM",
            )
        equal = expected.shape == live.shape and torch.equal(expected, live.detach().cpu())
        yield _finding(fqn, native.spec, equal, note if equal else f"{note} {native.stored}".strip())


def _finding(name: str, spec: ShardingSpec, equal: bool, note: str) -> dict[str, Any]:
    return {"name": name, "spec": None if spec.is_replicated else str(spec), "equal": equal, "note": note}
