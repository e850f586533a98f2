"""`get_device_meshes` makes, on four gloo ranks, the meshes that `describe` and TorchTitan's `ParallelDims` name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from titan_bridge.device_meshes import get_device_meshes, to_parallel_dims
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import MESHES, Sizes, describe
from titan_bridge.sharding import ShardingSpec

pytestmark = pytest.mark.distributed
ALL_SIZES = [
    Sizes(dp=2, tp=2, ep=4),
    Sizes(dp=2, tp=2, ep=2),
    Sizes(tp=4),
    Sizes(dp_replicate=2, dp=2),
    Sizes(pp=2, tp=2, ep=2),
    Sizes(pp=2, dp=2, ep=2, dp_outside=True),
]


def vllm_config(**sizes: object) -> SimpleNamespace:
    """The fields of vLLM's ParallelConfig that are read."""
    return SimpleNamespace(
        **{
            "tensor_parallel_size": 1,
            "data_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "enable_expert_parallel": False,
        }
        | sizes
    )


def as_described(sizes: Sizes) -> None:
    meshes, rank = get_device_meshes(sizes), dist.get_rank()
    assert list(meshes) == list(MESHES)
    for name in sizes.meshes:
        told = describe(name, sizes, rank=rank)
        mesh = meshes[name]
        assert (mesh.mesh_dim_names, tuple(mesh.shape)) == (told.axes, told.shape), name
        assert tuple(mesh.mesh.flatten().tolist()) == told.flat_ranks(), name
        assert tuple(mesh.get_coordinate()) == told.coordinate(rank), name


def as_torchtitan(sizes: Sizes) -> None:
    meshes, dims = get_device_meshes(sizes), to_parallel_dims(sizes, "partial_dtensor")
    for axis, mesh in (
        ("tp", "dense"),
        ("fsdp", "dense"),
        ("ep", "sparse"),
        ("efsdp", "sparse"),
        ("pp", "pp"),
    ):
        if sizes.axis(axis) > 1:
            theirs = dims.get_optional_mesh(axis)
            ours = meshes[mesh] if axis == mesh else meshes[mesh][axis]
            assert dist.get_process_group_ranks(ours.get_group()) == theirs.mesh.tolist(), axis


def made_once() -> None:
    sizes = ALL_SIZES[0]
    first, groups = get_device_meshes(sizes), len(distributed_c10d._world.pg_map)
    again = get_device_meshes(
        vllm_config(tensor_parallel_size=2, data_parallel_size=2, enable_expert_parallel=True)
    )
    assert all(again[name] is first[name] for name in MESHES)
    assert len(distributed_c10d._world.pg_map) == groups
    assert first["tp"].get_group() is first["dense"]["tp"].get_group()


def carry_tensors() -> None:
    """What the specs are for: a gathered DTensor and FSDP, on meshes with axes of size 1."""
    meshes = get_device_meshes(Sizes(dp=2, tp=2, ep=4))
    full = torch.arange(48.0).reshape(8, 6)
    for mesh, placements in (
        ("dense", (Replicate(), Replicate(), Shard(1))),
        ("dense", (Replicate(), _StridedShard(0, split_factor=2), Shard(0))),
        ("sparse", (Replicate(), Replicate(), Shard(0))),
        ("tp", (Shard(0),)),
    ):
        spec = ShardingSpec(mesh=mesh, placements=placements)
        pieces = spec.pieces(full.shape, meshes[mesh].shape, meshes[mesh].get_coordinate())
        local = torch.empty(spec.local_shape(full.shape, meshes[mesh].shape, meshes[mesh].get_coordinate()))
        for piece in pieces:
            local[piece.local.slices] = full[piece.box.slices]
        assert torch.equal(DTensor.from_local(local, meshes[mesh], placements).full_tensor(), full)
    layer = nn.Linear(6, 8, bias=False)
    fully_shard(layer, mesh=meshes["dense"]["dp_replicate", "fsdp"])
    assert layer.weight.to_local().shape == (4, 6)
    experts = nn.Linear(6, 8, bias=False)
    fully_shard(experts, mesh=meshes["sparse"]["dp_replicate", "efsdp"])  # efsdp has size 1
    assert experts.weight.to_local().shape == (8, 6)


def refusals() -> None:
    with pytest.raises(BridgeError, match="is 2 ranks, but the process group has 4"):
        get_device_meshes(Sizes(tp=2))
    outside = get_device_meshes(vllm_config(data_parallel_size=2, pipeline_parallel_size=2))
    rank = dist.get_rank()
    assert outside["dp"].mesh.tolist() == [rank % 2, rank % 2 + 2]
    assert outside["pp"].mesh.tolist() == [rank // 2 * 2, rank // 2 * 2 + 1]
    # dp of a dense model: its engines are worlds of their own, here of four tp ranks.
    assert get_device_meshes(vllm_config(tensor_parallel_size=4, data_parallel_size=8))["dp"].size() == 1


def all_of_them(rank: int, world: int) -> None:
    for sizes in ALL_SIZES:
        as_described(sizes)
    for sizes in (ALL_SIZES[1], ALL_SIZES[-1]):
        as_torchtitan(sizes)
    for scenario in (made_once, carry_tensors, refusals):
        scenario()


def test_four_ranks(new_ranks):
    new_ranks.run(all_of_them)
    new_ranks.run(all_of_them)  # in another process group: nothing is left of the first one
    with pytest.raises(BridgeError, match="no process group"):
        get_device_meshes(ALL_SIZES[0])
