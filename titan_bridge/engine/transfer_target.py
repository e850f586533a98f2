"""The live weights of one vLLM worker as the target of a transfer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from vllm.distributed.parallel_state import get_world_group
from vllm.platforms import current_platform

from titan_bridge.checkpoint.mapping import separate_qkv_views
from titan_bridge.engine.cpu.pages import zeros_like
from titan_bridge.engine.model.lora import AdapterManager, LiveAdapter
from titan_bridge.errors import BridgeError
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout, dtype_name
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.sharding.view import View
from titan_bridge.transfer.source import local_of
from titan_bridge.transfer.target import Target

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from titan_bridge.engine.model.wrapper import TitanForCausalLM


def target_of(model: nn.Module, vllm_config: VllmConfig) -> Target:
    """What a worker receives into.

    Raises:
        BridgeError: vLLM's own model without specs.
    """
    place = _place(vllm_config)
    if hasattr(model, "weights_changed"):
        return _titan(cast("TitanForCausalLM", model), place)
    # Late: it imports vLLM's layers, which TorchTitan models do not need.
    from titan_bridge.engine.native.transfer import native_target  # noqa: PLC0415

    return native_target(model, vllm_config, place)


def _place(vllm_config: VllmConfig) -> dict[str, Any]:
    parallel = vllm_config.parallel_config
    return {
        "rank": dist.get_rank(),
        "index": parallel.data_parallel_index * parallel.world_size + parallel.rank,
        "agree": _least,
    }


def adapter_target(model: Any, vllm_config: VllmConfig, name: str, scaling: float | None) -> Target:
    """A LoRA adapter that this worker has loaded, whole on every worker of its stage, by TorchTitan's names.

    Args:
        scaling: Of its products from now on; None: as it was loaded.

    Raises:
        BridgeError: Not a TorchTitan model, or no adapter of this name.
    """
    manager = getattr(model, "lora_manager", None)
    if not isinstance(manager, AdapterManager):
        why = (
            "it was started without --enable-lora"
            if hasattr(model, "setup")
            else f"it serves {type(model).__name__}"
        )
        raise BridgeError(f"adapter {name!r}: this engine takes no LoRA adapters from a trainer: {why}")
    adapter = LiveAdapter(manager, name, scaling)
    ranks = model.setup.sizes.ranks_of(model.stage)
    mesh = MeshLayout.make(("worker",), (len(ranks),), ranks)
    spec = ShardingSpec(mesh="workers", placements=(Replicate(),))
    params = {
        fqn: ParamLayout(spec=spec, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype))
        for fqn, tensor in adapter.tensors.items()
    }
    return Target(
        tensors=adapter.checked,
        layout=Layout(meshes={"workers": mesh}, params=params),
        on_change=adapter.write,
        **_place(vllm_config),
    )


def _least(mine: Sequence[int]) -> Sequence[int]:
    """Over all workers that step together: dp ranks in lockstep, too, but not replicas that step by themselves."""
    seen = torch.tensor(mine)
    dist.all_reduce(seen, op=dist.ReduceOp.MIN, group=get_world_group().cpu_group)
    return seen.tolist()


def _titan(model: TitanForCausalLM, place: Mapping[str, Any]) -> Target:
    setup = model.setup
    vocab, padded = setup.hf["vocab_size"], setup.padded_vocab
    unpadded = {}
    if padded != vocab:
        unpadded = {
            name: vocab
            for name, param in model.layout.params.items()
            if param.shape
            and param.shape[0] == padded
            and name.split(".")[0] in ("tok_embeddings", "lm_head")
        }

    def views() -> Sequence[View]:
        separate = separate_qkv_views(setup.family, setup.hf, padded)
        return (*setup.family.views(setup.hf, padded_vocab=padded), *separate)

    def changed(names: Iterable[str], ahead: Any) -> None:
        known = model.tensors()
        model.weights_changed([known[name] for name in names if name in known], ahead)

    def swap(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        known = model.tensors()
        before = {name: known[name].data for name in tensors}
        for name, tensor in tensors.items():
            known[name].data = tensor
            model.live[name].data = tensor  # what loads checkpoints writes there
        return before

    # On a GPU a graph may hold addresses; under FSDP a parameter is not always the tensor that holds the weights.
    plain = not any(isinstance(tensor, DTensor) for tensor in model.tensors().values())
    swaps = current_platform.is_cpu() and plain and not setup.sharded
    return Target(
        swap=swap if swaps else None,
        ahead=model.packing.ahead,
        memory=zeros_like,  # as the live weights' own
        tensors=_Live(model),
        layout=model.layout,
        on_change=changed,
        views=views,
        unpadded=unpadded,
        **place,
    )


class _Live:
    """The live local tensors of a TorchTitan model."""

    def __init__(self, model: TitanForCausalLM) -> None:
        self._model = model
        # A sharded model has gathered tensors in the place of some parameters after a step; those that it had
        # before the first one stay the truth.
        self._built = self._now() if model.setup.sharded else None

    def __call__(self) -> Mapping[str, torch.Tensor]:
        return self._built if self._built is not None else self._now()

    def _now(self) -> dict[str, torch.Tensor]:
        tensors = self._model.tensors()
        return {name: local_of(tensors[name]) for name in self._model.live}
