"""Sample weights for any layout, the same on every rank: for tests, benchmarks and trying a layout out."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_bridge.sharding.layout import Layout
from titan_bridge.transfer.source import TensorSource
from titan_bridge.transfer.target import Target
from titan_bridge.transfer.worker import Worker


def sample(
    name: str, shape: tuple[int, ...], version: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A global tensor of random numbers; the same name and version give the same ones."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + version)
    return torch.empty(shape).uniform_(-1, 1, generator=generator).to(dtype)


def local_part(whole: torch.Tensor, layout: Layout, name: str, rank: int) -> torch.Tensor:
    """What `rank` holds of a global tensor."""
    shape = layout.local_shape(name, rank)
    assert shape is not None, f"rank {rank} holds nothing of {name}"
    local = torch.empty(shape, dtype=whole.dtype)
    for piece in layout.pieces(name, rank):
        local[piece.local.slices] = whole[piece.box.slices]
    return local


def sample_locals(layout: Layout, rank: int, version: int) -> dict[str, torch.Tensor]:
    """The local tensors of `rank`, in the layout's dtypes."""
    result = {}
    for name, param in layout.params.items():
        if layout.local_shape(name, rank) is not None:
            whole = sample(name, param.shape, version, getattr(torch, param.dtype))
            result[name] = local_part(whole, layout, name, rank)
    return result


def as_dtensors(locals_: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """Local tensors as DTensors, on meshes made of the default process group; every rank of it has to call this."""
    meshes = {
        name: DeviceMesh("cpu", torch.tensor(mesh.array), mesh_dim_names=mesh.axes)
        for name, mesh in layout.meshes.items()
    }
    return {
        name: DTensor.from_local(
            local,
            meshes[layout.params[name].spec.mesh],
            layout.params[name].spec.placements,
            run_check=False,
            shape=torch.Size(layout.params[name].shape),
            stride=torch.empty(layout.params[name].shape, device="meta").stride(),
        )
        for name, local in locals_.items()
    }


def sample_dtensors(layout: Layout, rank: int, version: int) -> dict[str, torch.Tensor]:
    """`sample_locals` as DTensors; see `as_dtensors`."""
    return as_dtensors(sample_locals(layout, rank, version), layout)


def sample_target(layout: dict[str, Any], rank: int, index: int, version: int) -> Target:
    """A worker's live tensors, filled; `layout` as JSON so that it can be sent to a process."""
    read = Layout.from_json(layout)
    live = sample_locals(read, rank, version)

    def swap(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        before = {name: live[name] for name in tensors}
        live.update(tensors)
        return before

    return Target(tensors=lambda: live, layout=read, rank=rank, index=index, swap=swap)


class TrappedSource(TensorSource):
    """Of a trainer to which something happens in the next update, when the fourth tensor is taken for sending."""

    act: Callable[[], object] | None = None

    def local(self) -> dict[str, torch.Tensor]:
        tensors, act, self.act = super().local(), self.act, None
        return tensors if act is None else _Trap(tensors, act)


class _Trap(dict):
    def __init__(self, tensors: dict[str, torch.Tensor], act: Callable[[], object]) -> None:
        super().__init__(tensors)
        self._act, self._left = act, 4

    def __getitem__(self, name: str) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            self._act()
        return super().__getitem__(name)


def differences(worker: Worker, version: int) -> list[str]:
    """Names of the live tensors of a worker that are not, bit for bit, those of `version`."""
    target = worker.target
    live = target.tensors()
    expected = sample_locals(target.layout, target.rank, version)
    return [name for name, want in expected.items() if not same_bits(live[name], want)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, NaNs and signed zeros included."""
    a, b = a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    return a.shape == b.shape and torch.equal(a, b)
