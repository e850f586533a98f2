"""What a worker says about the parameters that it really holds. Runs inside vLLM's worker processes.

The four functions become methods of vLLM's worker (`patches.answer_about_specs`), so that `collective_rpc`
reaches them by name whatever extension class the user has. Answers are plain lists, dicts, strings and numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate

from titan_bridge.engine.native import specs as native_specs
from titan_bridge.engine.native.layers import Native
from titan_bridge.engine.verify import place, verify_native, verify_titan
from titan_bridge.errors import BridgeError
from titan_bridge.fingerprint import of_plan, shapes_of
from titan_bridge.mesh import DENSE, Sizes, mesh_axes, sizes_of
from titan_bridge.model_layout import ParamSpec, as_layout
from titan_bridge.models.experts import local
from titan_bridge.sharding.layout import ParamLayout, dtype_name, torch_dtype
from titan_bridge.sharding.plan import plan
from titan_bridge.sharding.spec import ShardingSpec, attached, placement_to_str
from titan_bridge.sharding.tensors import TensorMetadata


def titan_sharding_spec(worker: Any) -> dict[str, Any]:
    """Layout JSON of what `worker` serves, read off its live parameters: of its pipeline stage.

    Raises:
        BridgeError: vLLM's own model without `attach_specs`, or a live tensor that is not as large as its spec says.
    """
    model, sizes = worker.get_model(), _sizes(worker)
    if hasattr(model, "setup"):
        known = model.layout.parallelism
        return as_layout(_titan_params(model, sizes), sizes, parallelism=known).to_json()
    params = {
        fqn: ParamSpec(shape=native.shape, dtype=tensor.dtype, spec=native.spec)
        for fqn, tensor, native in _native_params(model)
    }
    return as_layout(params, sizes).to_json()


def titan_native_specs(worker: Any) -> dict[str, Any]:
    """What the Layout JSON cannot hold about vLLM's own model, by FQN: parts, padding, and how it is stored.

    `{"mesh", "placements" (None: replicated), "shape" (global), "local_shape" (as loaded), "live_shape", "dtype",
    "dim", "parts": [{"name", "size", "replicas"}], "padding", "stored"}`; see `native_specs.Native`.
    """
    sizes = _sizes(worker)
    return {
        fqn: {
            "mesh": native.spec.mesh,
            "placements": None
            if native.spec.is_replicated
            else [placement_to_str(placement) for placement in native.spec.placements],
            "shape": list(native.shape),
            "local_shape": list(native.spec.local_shape(native.shape, *place(native.spec, sizes))),
            "live_shape": list(tensor.shape),
            "dtype": dtype_name(tensor.dtype),
            "dim": native.dim,
            "parts": [asdict(part) for part in native.parts],
            "padding": native.padding,
            "stored": native.stored,
        }
        for fqn, tensor, native in _native_params(worker.get_model())
    }


def titan_verify_specs(worker: Any, checkpoint: str) -> list[dict[str, Any]]:
    """Hold every live parameter against the checkpoint that it was loaded from, bit for bit.

    Each is compared with the slices that its spec cuts from the checkpoint, of which a TorchTitan parameter's are read
    and compared some rows at a time (`verify.SLICE_BYTES`). Workers need not call it together.

    Args:
        checkpoint: Directory with any weights that we read, quantized ones too, or a training run, whose last step is
            meant; for vLLM's own model, the one with the safetensors files.

    Returns:
        For each parameter `{"name", "spec", "equal", "note"}`; `note` states padding, packing, or what is wrong.
    """
    model, sizes = worker.get_model(), _sizes(worker)
    if not hasattr(model, "setup"):
        return list(verify_native(model, _native_params(model), sizes, checkpoint))
    params = _titan_params(model, sizes)
    with model.packing.unpacked():
        live = {fqn: local(tensor).detach() for fqn, tensor, _ in _live(model)}
        return list(verify_titan(model, live, params, sizes, checkpoint))


def titan_fingerprints(worker: Any, dtype: str | None = None) -> dict[str, Any]:
    """What this worker's rank adds to the fingerprint of each Hugging Face tensor; see `titan_bridge.fingerprint`.

    Of replicas one rank counts an element, so the sums of all ranks add up to each tensor once.

    Args:
        dtype: Cast the weights to it first, e.g. "bfloat16"; expert biases keep their own.

    Returns:
        `{"rank", "world", "sums": {name: hexadecimal}, "shapes": {name: list}, "dtypes": {name: text}}`.

    Raises:
        BridgeError: vLLM's own model, or a dtype that does not exist.
    """
    model = worker.get_model()
    if not hasattr(model, "setup"):
        raise BridgeError(f"{type(model).__name__} has no fingerprints; serve with model_impl='torchtitan'")
    setup, layout = model.setup, model.layout
    views = setup.family.views(setup.hf, padded_vocab=setup.padded_vocab)
    cast = None if dtype is None else torch_dtype(dtype)
    kept = {view.name for view in views if view.fqn in setup.family.expert_biases(setup.hf)}
    dtypes = {
        view.name: cast
        if cast is not None and view.name not in kept
        else torch_dtype(layout.params[view.fqn].dtype)
        for view in views
    }
    whole = [TensorMetadata.whole(view.name, view.shape, dtypes[view.name], "all") for view in views]
    made, rank = plan(layout, whole, views), dist.get_rank()
    with model.packing.unpacked():
        live = {fqn: local(tensor).detach() for fqn, tensor, _ in _live(model)}
        sums = of_plan(made, rank, lambda copy: live[copy.source_name], dtypes)
    return {
        "rank": rank,
        "world": dist.get_world_size(),
        "sums": {name: f"{number:016x}" for name, number in sums.items()},
        "shapes": {name: list(shape) for name, shape in shapes_of(made).items()},
        "dtypes": {name: dtype_name(each) for name, each in dtypes.items()},
    }


def _sizes(worker: Any) -> Sizes:
    setup = getattr(worker.get_model(), "setup", None)
    return (
        setup.sizes
        if setup is not None
        else sizes_of(worker.vllm_config.parallel_config, dist.get_world_size())
    )


def _titan_params(model: Any, sizes: Sizes) -> dict[str, ParamSpec]:
    params = {}
    for fqn, tensor, known in _live(model):
        prefix, _, name = fqn.rpartition(".")
        spec = attached(model.model.get_submodule(prefix), name)
        if spec is None:
            raise BridgeError(f"{fqn} carries no spec; every parameter of a served model must")
        expected = spec.local_shape(known.shape, *place(spec, sizes))
        if tuple(local(tensor).shape) != expected:
            raise BridgeError(
                f"{fqn} has local shape {tuple(local(tensor).shape)}; its spec {spec} says {expected}"
            )
        params[fqn] = ParamSpec(shape=known.shape, dtype=tensor.dtype, spec=spec)
    return params


def _live(model: Any) -> Iterator[tuple[str, torch.Tensor, ParamLayout]]:
    """Every live parameter and persistent buffer of a TorchTitan model; refuses one that its layout does not list."""
    live = model.tensors()
    named = dict(model.model.named_parameters()).keys() - model.layout.params.keys()
    # What vLLM's attention derives from weights, it keeps as parameters.
    if unlisted := sorted(fqn for fqn in named if ".inner_attention." not in fqn):
        raise BridgeError(f"parameters without a layout: {', '.join(unlisted)}")
    rank = dist.get_rank()
    for fqn, known in model.layout.params.items():
        if model.layout.mesh_of(fqn).coordinate(rank) is not None:
            yield fqn, live[fqn], known


def _native_params(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, Native]]:
    """Every parameter of vLLM's own model; one that no primitive declared is whole on every rank."""
    if not native_specs.is_declared(model):
        raise BridgeError(
            f"{type(model).__name__} carries no specs; start the engine with "
            "additional_config={'titan': {'attach_specs': true}}"
        )
    for prefix, module, reason in native_specs.undescribed_in(model):
        if not native_specs.is_declared(module):
            raise BridgeError(f"{prefix} ({type(module).__name__}) has no spec: {reason}")
    declared = {
        f"{prefix}.{name}" if prefix else name: native
        for prefix, _, name, native in native_specs.declared_in(model)
    }
    for fqn, tensor in model.named_parameters():
        whole = ShardingSpec(mesh=DENSE, placements=(Replicate(),) * len(mesh_axes(DENSE)))
        yield fqn, tensor, declared.get(fqn) or Native(spec=whole, shape=tuple(tensor.shape))
