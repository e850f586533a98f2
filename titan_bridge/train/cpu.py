"""Everything that gives way when TorchTitan trains on a CPU, and nothing else.

TorchTitan is written for accelerators. Each entry of `SHIMS` says what is different here, why, for which version
it was found necessary, and when it can be deleted. Nothing of this file is used on a machine with an accelerator:
`build.py` and `worker.py` import it only on a CPU, and every function refuses elsewhere.
"""

from __future__ import annotations

import inspect
import math
import os
import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.tools.utils as titan_utils
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import Module

from titan_bridge.device import use_cpu_if_no_accelerator
from titan_bridge.models.adapters import keep_expert_dtype, use_plain_attention
from titan_bridge.sharding import pieces_of

TORCHTITAN = "0.3."
"""Versions of TorchTitan that the shims were written for, by prefix."""


@dataclass(frozen=True, kw_only=True)
class Shim:
    """One difference from training on an accelerator.

    Attributes:
        what: what is done.
        why: what happens without it.
        seen: versions in which it was found necessary.
        until: when it can be deleted.
    """

    what: str
    why: str
    seen: str
    until: str


_SEEN = "torchtitan 0.3.0, torch 2.13.0"

SHIMS = {
    "device": Shim(
        what="TorchTitan's device type is cpu, and its device module has the memory functions of an accelerator",
        why="without an accelerator it chooses cuda: DeviceMesh fails, torch.cpu has no get_device_name",
        seen=_SEEN,
        until="torchtitan.tools.utils.get_device_info returns cpu where there is no accelerator",
    ),
    "attention": Shim(
        what="inner attention is PlainAttention; it is causal over the whole row, so that a document also "
        "sees the one before it in its row",
        why="flex attention has no backward pass on a CPU, varlen attention no CPU kernel",
        seen=_SEEN,
        until="torch.nn.attention.flex_attention can be trained on a CPU",
    ),
    "spmd_backend": Shim(
        what='parallelism.spmd_backend = "partial_dtensor" and no other; with torch 2.13 it is the default everywhere',
        why="the other backends have been tried on accelerators only",
        seen=_SEEN,
        until="the Trainer runs under spmd_types with the released torch; see compat.py",
    ),
    "init": Shim(
        what="initial weights are drawn whole on each rank, which keeps its part: the same for every layout",
        why="DTensor has no random state for a CPU, so that each rank draws its part from the same numbers: all parts "
        "of a matrix are equal, tokens v and v + V/2 have one embedding, and training hardly tells them apart",
        seen=_SEEN,
        until="torch.distributed.tensor._random.is_rng_supported_mesh is true for a CPU mesh",
    ),
    "force_sum": Shim(
        what="FSDP reduces gradients by sum: set_force_sum_reduction_for_comms(True) on every FSDP module",
        why="a gradient divide factor becomes ReduceOp.PREMUL_SUM, which gloo does not have",
        seen=_SEEN,
        until="fully_shard chooses the sum by itself under gloo",
    ),
    "timeouts": Shim(
        what="set_pg_timeouts without device ids in its barrier",
        why="gloo's barrier takes no device_ids, and torch.cpu.current_device() is a word",
        seen=_SEEN,
        until="torchtitan.distributed.utils.set_pg_timeouts passes device_ids only to nccl",
    ),
    "cuda_graphs": Shim(
        what="training.disable_cuda_graphs = true",
        why="the Trainer captures CUDA graphs by default",
        seen=_SEEN,
        until="the Trainer asks for the device first",
    ),
    "float32": Shim(
        what="training.mixed_precision_param = float32 unless it is set, and then experts compute in float32, too",
        why="many CPUs have no bfloat16 arithmetic, and TorchTitan's experts cast to it whatever the policy says",
        seen=_SEEN,
        until="never for the default; the experts when GroupedExperts follows the mixed precision policy",
    ),
    "peak_flops": Shim(
        what="the peak FLOPS that utilisation is measured against are infinite, so that it shows as 0 %",
        why="the fallback is an A100's, which says nothing about a CPU",
        seen=_SEEN,
        until="torchtitan.tools.utils.get_peak_flops has an answer for a CPU",
    ),
}

REQUIRED: dict[str, Any] = {
    "parallelism.spmd_backend": "partial_dtensor",
    "training.disable_cuda_graphs": True,
    "compile.enable_async_tensor_parallel": False,
    "parallelism.enable_fsdp_symm_mem": False,
    "training.enable_cpu_offload": False,
}
"""Fields of `Trainer.Config` that have one possible value on a CPU."""

PREFERRED: dict[str, Any] = {"training.mixed_precision_param": "float32"}
"""Fields whose default is another one on a CPU."""


def prepare_spec(spec: ModelSpec, *, float32: bool) -> ModelSpec:
    """A model spec that trains on a CPU (shims attention, float32 and force_sum); changes `spec.model` in place.

    Args:
        float32: whether forward and backward compute in float32.
    """
    _only_on_cpu()
    if isinstance(spec.model, Decoder.Config):
        use_plain_attention(spec.model)
        if float32:
            keep_expert_dtype(spec.model)
    return replace(spec, parallelize_fn=_with_sum_reduction(spec.parallelize_fn))


def apply() -> None:
    """Patch TorchTitan in this process (shims device, init, timeouts and peak_flops); call it again freely.

    Raises:
        RuntimeError: an accelerator is present, another version of TorchTitan is, or what would be patched is
            not what it was.
    """
    _only_on_cpu()
    version = metadata.version("torchtitan")
    if not version.startswith(TORCHTITAN):
        raise RuntimeError(f"torchtitan {version} is installed; training on a CPU was made for {TORCHTITAN}*")
    use_cpu_if_no_accelerator()
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan.") and hasattr(module, "device_module"):
            vars(module)["device_module"] = DEVICE_MODULE
    _patch(Module, "_init_param", _init_param, "self._param_init[name](param)")
    _patch(dist_utils, "set_pg_timeouts", _set_pg_timeouts, "torch.distributed.barrier(device_ids=")
    _patch(titan_utils, "get_peak_flops", _get_peak_flops, "A100")


def _only_on_cpu() -> None:
    if torch.accelerator.is_available():
        raise RuntimeError(
            "titan_bridge.train.cpu is for machines without an accelerator, and this one has one"
        )


def _patch(module: Any, name: str, ours: Callable[..., Any], marker: str) -> None:
    theirs = getattr(module, name)
    if theirs is ours:
        return
    if marker not in inspect.getsource(theirs):
        raise RuntimeError(
            f"{module.__name__}.{name} is not what it was in {_SEEN}; look at titan_bridge/train/cpu.py"
        )
    if list(inspect.signature(theirs).parameters) != list(inspect.signature(ours).parameters):
        raise RuntimeError(f"{module.__name__}.{name} takes other arguments than in {_SEEN}")
    setattr(module, name, ours)


_THEIR_INIT = Module._init_param


def _init_param(self: Module, name: str, param: torch.nn.Parameter) -> None:
    """TorchTitan's method of this name: initialise a DTensor from the whole tensor that every rank draws."""
    if not isinstance(param, DTensor) or name not in (self._param_init or {}):
        _THEIR_INIT(self, name, param)
        return
    initializer = self._param_init[name]
    if initializer is skip_param_init:
        return
    whole = torch.empty(param.shape, dtype=param.dtype)
    initializer(whole)
    mesh, local = param.device_mesh, param.to_local()
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # every rank is in the mesh of what it holds
    for piece in pieces_of(param.placements, param.shape, mesh.shape, coordinate):
        local[piece.local.slices] = whole[piece.box.slices]


def _with_sum_reduction(parallelize: Callable[..., Any]) -> Callable[..., Any]:
    def parallelize_and_sum(model: Any, **options: Any) -> Any:
        model = parallelize(model, **options)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model

    return parallelize_and_sum


def _set_pg_timeouts(timeout: timedelta, parallel_dims: ParallelDims) -> None:
    """TorchTitan's function of this name, with a barrier that gloo has."""
    dist.barrier()
    meshes = parallel_dims.get_all_one_dimensional_meshes().values()
    for group in [*(mesh.get_group() for mesh in meshes), None]:
        vars(dist)["set_timeout"](timeout, group)  # public in torch or made so by compat.py


def _get_peak_flops(device_name: str) -> float:
    return math.inf


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _DeviceModule:
    """torch.cpu with what TorchTitan asks of an accelerator's module; memory is the process's largest resident size."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return platform.processor() or platform.machine()

    @staticmethod
    def get_device_properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name=_DeviceModule.get_device_name(), total_memory=_memory())

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def set_device(device: Any) -> None: ...

    @staticmethod
    def empty_cache() -> None: ...

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None: ...

    @staticmethod
    def memory_stats(device: Any = None) -> dict[str, int]:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"active_bytes.all.peak": resident, "reserved_bytes.all.peak": resident}


DEVICE_MODULE = _DeviceModule()
