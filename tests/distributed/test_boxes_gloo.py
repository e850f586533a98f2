"""Boxes are what `distribute_tensor` and `fully_shard` really leave on four gloo ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry
from torch.distributed.tensor._redistribute import redistribute_local_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from titan_bridge.errors import BridgeError
from titan_bridge.sharding import ShardingSpec, attach, get
from titan_bridge.transfer.source import TensorSource

pytestmark = pytest.mark.distributed


def assert_local_is_the_boxes(param: DTensor, full: torch.Tensor) -> None:
    """The local tensor equals the slices that the spec cuts, and gives the global one back when gathered."""
    attach(param, "mesh", param.placements)
    spec = get(param) or ShardingSpec(mesh="mesh", placements=tuple(param.placements))
    mesh, local = param.device_mesh, param.to_local()
    coordinate = mesh.get_coordinate()
    assert tuple(local.shape) == spec.local_shape(full.shape, mesh.shape, coordinate)
    seen = 0
    for piece in spec.pieces(full.shape, mesh.shape, coordinate):
        torch.testing.assert_close(local[piece.local.slices], full[piece.box.slices], rtol=0, atol=0)
        seen += piece.box.numel
    assert seen == local.numel()
    gathered = DTensor.from_local(local, mesh, spec.placements, shape=full.shape, stride=full.stride())
    torch.testing.assert_close(gathered.full_tensor(), full, rtol=0, atol=0)


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


class Parameters(nn.Module):
    """Holds parameters under names; `fully_shard` only looks at them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def check_fsdp_over(axis: str, sizes: tuple[int, int], given: dict, fsdp_dim) -> dict:
    """`fully_shard` over the first axis of tensors already placed on the second; returns the placements."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("fsdp", axis))
    full = {name: numbered(*shape) for name, (shape, _) in given.items()}
    module = Parameters(
        {n: distribute_tensor(full[n], mesh[axis], [place]) for n, (_, place) in given.items()}
    )
    dims = {id(param): fsdp_dim(name) for name, param in module.named_parameters()}
    fully_shard(module, mesh=mesh["fsdp"], shard_placement_fn=lambda param: Shard(dims[id(param)]))
    for name, param in module.named_parameters():
        assert_local_is_the_boxes(param, full[name])
    return {name: tuple(param.placements) for name, param in module.named_parameters()}


def fsdp_x_tp() -> None:
    given = {
        "wqkv": ((20, 6), Shard(0)),
        "wo": ((6, 20), Shard(1)),
        "norm": ((6,), Replicate()),
        "uneven": ((22, 3), Shard(0)),
        "tiny": ((3, 3), Shard(1)),
    }
    placements = check_fsdp_over("tp", (2, 2), given, lambda name: 0)
    assert placements["wqkv"] == (_StridedShard(0, split_factor=2), Shard(0))
    assert placements["wo"] == (Shard(0), Shard(1))


def hsdp_x_tp() -> None:
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp_replicate", "fsdp", "tp"))
    full = numbered(16, 4)
    module = Parameters({"w": distribute_tensor(full, mesh["tp"], [Shard(0)])})
    fully_shard(module, mesh=mesh["dp_replicate", "fsdp"])
    assert tuple(module.w.placements) == (Replicate(), _StridedShard(0, split_factor=2), Shard(0))
    assert_local_is_the_boxes(module.w, full)


def efsdp_x_ep() -> None:
    experts = {"w1_EFD": ((4, 6, 2), Shard(0)), "bias_E": ((8,), Shard(0))}
    placements = check_fsdp_over("ep", (2, 2), experts, lambda name: 0)
    assert placements["w1_EFD"] == (_StridedShard(0, split_factor=2), Shard(0))
    # More efsdp ranks than local experts: TorchTitan shards dim 1.
    placements = check_fsdp_over("ep", (2, 2), {"w1_EFD": ((2, 6, 5), Shard(0))}, lambda name: 1)
    assert placements["w1_EFD"] == (Shard(1), Shard(0))
    # efsdp of size 1 keeps its axis.
    placements = check_fsdp_over("ep", (1, 4), {"w1_EFD": ((8, 3, 2), Shard(0))}, lambda name: 0)
    assert placements["w1_EFD"] == (_StridedShard(0, split_factor=4), Shard(0))


def distributed_tensors() -> None:
    """Everything that `distribute_tensor` takes on two axes, even and uneven."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    choices = [Replicate(), Shard(0), Shard(1)]
    for shape in ((8, 4), (5, 3), (1, 7)):
        for first in choices:
            for second in choices:
                full = numbered(*shape)
                assert_local_is_the_boxes(distribute_tensor(full, mesh, [first, second]), full)


def another_shard_order() -> None:
    """Rows cut over the second axis first: placements alone would say the rows of other ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    full = numbered(8, 4)
    plain = distribute_tensor(full, mesh, [Shard(0), Shard(0)])
    order = (ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),)
    spec = DTensorSpec(mesh, plain.placements, tensor_meta=plain._spec.tensor_meta, shard_order=order)
    turned = DTensor(
        redistribute_local_tensor(plain.to_local(), plain._spec, spec), spec, requires_grad=False
    )
    if dist.get_rank() in (1, 2):
        assert not torch.equal(turned.to_local(), plain.to_local())
    TensorSource({"w": plain}, rank=dist.get_rank()).layout()
    with pytest.raises(BridgeError, match=r"w: dim 0 is sharded over mesh axes \(1, 0\).*only left to right"):
        TensorSource({"w": turned}, rank=dist.get_rank()).layout()
    with pytest.raises(BridgeError, match="shard_order"):
        attach(turned, "mesh", turned.placements)


SCENARIOS = (fsdp_x_tp, hsdp_x_tp, efsdp_x_ep, distributed_tensors, another_shard_order)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_four_ranks(new_ranks, scenario):
    new_ranks.run(on_rank, scenario)


def on_rank(rank: int, world: int, scenario: Callable[[], None]) -> None:
    scenario()
