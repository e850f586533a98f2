"""vLLM's `reload_weights` for TorchTitan's classes: other weights into the live parameters, in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from titan_bridge.engine.loading.model_loader import load
from titan_bridge.errors import BridgeError


@torch.no_grad()
def reload(
    vllm_config: Any,
    model: Any,
    weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None,
    weights_path: str | None = None,
    is_checkpoint_format: bool = True,
) -> None:
    """Fill the live parameters of `model` (a `TitanForCausalLM`) again.

    A checkpoint is held against the model before anything is written, so that one that does not fit leaves the old
    weights serving. A stream is not: weight transfer "titan" is all or nothing.

    Args:
        weights_iterator: Hugging Face names and whole tensors; all of them must come.
        weights_path: A directory in any format that we read, or a training run, whose last whole step is taken, or one
            step of it; becomes the engine's model. Its names may be those of the engine's `names`, or TorchTitan's or
            Hugging Face's. None with no iterator reads what was read last again.
        is_checkpoint_format: As vLLM has it; tensors of a kernel are not taken.

    Raises:
        BridgeError: Tensors that do not fit, all of them named, or a directory without weights.
    """
    if not is_checkpoint_format:
        raise BridgeError(
            "reload_weights(is_checkpoint_format=False) is not supported with model_impl='torchtitan'; "
            "send checkpoint tensors, or use weight transfer 'titan'"
        )
    if weights_iterator is not None:
        model.load_weights(weights_iterator)
        return
    load(model, weights_path or str(model.source or vllm_config.model_config.model), again=True)
    if weights_path is not None:
        vllm_config.model_config.model = weights_path
