"""The named meshes as torch's `DeviceMesh` and as TorchTitan's `ParallelDims`, in a process group of all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from titan_bridge.errors import BridgeError
from titan_bridge.mesh import DENSE, SPARSE, Sizes, describe, mesh_axes, sizes_of

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims


def to_parallel_dims(
    sizes: Sizes, spmd_backend: Literal["partial_dtensor", "full_dtensor", "spmd_types"] = "spmd_types"
) -> ParallelDims:
    """TorchTitan's ``ParallelDims`` for the same ranks; building its meshes needs a process group.

    The groups that hold the same part of a module (``tp_replicate``) are a part of its data parallelism: TorchTitan's
    ``parallelize`` shards nothing over that.
    """
    # Imported here because torch's own meshes must not cost the import of TorchTitan.
    from torchtitan.distributed import ParallelDims  # noqa: PLC0415

    from titan_bridge.device import use_cpu_if_no_accelerator  # noqa: PLC0415

    use_cpu_if_no_accelerator()
    dims = ParallelDims(
        dp_replicate=sizes.dp_replicate,
        dp_shard=sizes.dp * sizes.tp_replicate,
        cp=1,
        tp=sizes.tp,
        pp=sizes.pp,
        ep=sizes.ep,
        world_size=sizes.world,
        spmd_backend=spmd_backend,
    )
    if sizes.dp_outside and sizes.dp > 1:
        # It would number the ranks of its meshes in TorchTitan's order, and builds them when first asked for one.
        assert spmd_backend == "partial_dtensor", "the other backends ask for further meshes"
        roots = _roots(sizes, _device_type(), (sizes.dense_mesh, SPARSE))
        dims._world_mesh = roots[sizes.dense_mesh]
        dims._global_meshes = roots
        dims._single_axis_meshes = {
            axis: root[axis] for root in roots.values() for axis in root.mesh_dim_names or ()
        }
    return dims


def get_device_meshes(
    parallel_config: Any, *, ep: int | None = None, device_type: str | None = None
) -> dict[str, DeviceMesh]:
    """The named meshes of this rank as torch's own: those of `Sizes.meshes` and no others, axes of size 1 included.

    Needs an initialised default process group. The first call makes process groups, so every rank of the
    world makes it, with the same arguments; later calls return the same meshes. Meshes share the groups of
    the axes that they have in common ("tp" is the tp axis of "dense").

    Args:
        parallel_config: vLLM's ``ParallelConfig`` or `Sizes`; see `sizes_of`.
        ep: See `sizes_of`.
        device_type: For example "cpu"; else the accelerator's, else "cpu".

    Raises:
        BridgeError: No process group, or sizes that are not the world's.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise BridgeError("there is no process group; call torch.distributed.init_process_group first")
    sizes = sizes_of(parallel_config, dist.get_world_size(), ep=ep)
    device_type = device_type or _device_type()
    made = _MADE.setdefault(dist.group.WORLD, {})
    if (sizes, device_type) not in made:
        made[sizes, device_type] = _make(sizes, device_type)
    return dict(made[sizes, device_type])


_MADE: WeakKeyDictionary[Any, dict[tuple[Sizes, str], dict[str, DeviceMesh]]] = WeakKeyDictionary()
"""Meshes by default process group: making them twice would make all their process groups twice."""


def _device_type() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def _roots(sizes: Sizes, device_type: str, names: Iterable[str]) -> dict[str, DeviceMesh]:
    """Meshes of several axes over all ranks, with pp in front."""
    order = [rank for stage in range(sizes.pp) for rank in sizes.ranks_of(stage)]
    world = DeviceMesh(device_type, torch.tensor(order), mesh_dim_names=("world",))
    return {
        name: world._unflatten(0, (sizes.pp, *describe(name, sizes).shape), ("pp", *mesh_axes(name)))
        for name in names
    }


def _make(sizes: Sizes, device_type: str) -> dict[str, DeviceMesh]:
    roots = _roots(sizes, device_type, [name for name in sizes.meshes if len(mesh_axes(name)) > 1])
    meshes = {name: root[mesh_axes(name)] for name, root in roots.items()}
    meshes["dp"] = roots[DENSE]["dp_replicate", "fsdp"]._flatten("dp")
    meshes |= {"tp": roots[DENSE]["tp"], "ep": roots[SPARSE]["ep"], "pp": roots[DENSE]["pp"]}
    return {name: meshes[name] for name in sizes.meshes}
