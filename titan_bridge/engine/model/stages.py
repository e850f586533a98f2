"""Pipeline stages: which layers vLLM gives to each, and what of a model is on one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torchtitan.models.common.decoder import Decoder
from vllm import envs
from vllm.distributed.utils import get_pp_indices

from titan_bridge.engine.model.lower import strip
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes


def staged(sizes: Sizes, layers: int) -> Sizes:
    """`sizes` with the layers of each stage, of a model of so many.

    Raises:
        BridgeError: A stage would have none, or `VLLM_PP_LAYER_PARTITION` does not fit.
    """
    if sizes.pp == 1:
        return sizes
    if sizes.pp > layers:
        raise BridgeError(
            f"pp={sizes.pp} is more than the {layers} layers of the model; allowed: 1 to {layers}"
        )
    try:
        ends = [get_pp_indices(layers, stage, sizes.pp) for stage in range(sizes.pp)]
    except ValueError as error:
        raise BridgeError(
            f"VLLM_PP_LAYER_PARTITION={envs.VLLM_PP_LAYER_PARTITION} does not give {layers} layers to pp={sizes.pp} "
            f"stages: {error}"
        ) from None
    return replace(sizes, stages=tuple(last - first for first, last in ends))


def keep_stage(model: Decoder, sizes: Sizes, stage: int) -> None:
    """Take out of `model`, which is on meta, all that is not on this stage, in place; FQNs stay.

    What is missing is None, and TorchTitan's forward leaves it out. A tied embedding stays on the last stage, whose
    head has no weight of its own; `pass_on` takes it out of the forward there.
    """
    if sizes.pp == 1:
        return
    first, last = stage == 0, stage == sizes.pp - 1
    for index in range(len(model.layers)):
        if index not in sizes.layers_of(stage):
            del model.layers[str(index)]
    if not first and not (last and model.enable_weight_tying):
        model.tok_embeddings = None
    if not last:
        model.norm = model.lm_head = None
        model.enable_weight_tying = False


class _PassesOn(nn.Module):
    """First base of an embedding's class."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def pass_on(model: Decoder, stage: int) -> None:
    """Let the embedding that a later stage keeps for its head hand hidden states on as they are, in place."""
    embedding = model.tok_embeddings
    if stage == 0 or embedding is None:
        return
    strip(embedding)
    embedding.__class__ = type(f"Unused{type(embedding).__name__}", (_PassesOn, type(embedding)), {})
