"""A model directory: config.json, tokenizer files, and weights in any format that we read.

The weights lie in the directory itself, or, for a training run, in its `step-N` folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_bridge.checkpoint.dcp import is_dcp
from titan_bridge.checkpoint.engine_files import is_engine
from titan_bridge.checkpoint.mapping import check_source
from titan_bridge.checkpoint.open import is_checkpoint, open_checkpoint
from titan_bridge.errors import BridgeError
from titan_bridge.train.output import RECORD, Record, whole_steps

if TYPE_CHECKING:
    from titan_bridge.models import Family

LOAD_FORMAT = "titan"
"""vLLM's `load_format` for weights that we read."""
_EXPERT_BIAS = ".expert_bias_E"
"""TorchTitan's name of the buffer."""


def weights_directory(model: str, step: int | None = None) -> Path | None:
    """Where the weights of a model directory lie.

    Args:
        model: Directory with config.json.
        step: Of a training run; None takes the last whole one.

    Returns:
        None when there is nothing that we read (weights in another format, or a name on a hub).

    Raises:
        BridgeError: `step` is not there.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    steps = whole_steps(folder)
    if step is not None:
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise BridgeError(f"{model} has no whole checkpoint of step {step}; whole ones: {known}")
        return folder / f"step-{step}"
    if is_checkpoint(folder):
        return folder
    return folder / f"step-{steps[-1]}" if steps else None


def has_expert_bias(model: str, step: int | None = None) -> bool:
    """Whether the weights come with TorchTitan's load-balancing bias, which routes in serving, too.

    Args:
        model, step: As for `weights_directory`.

    Raises:
        BridgeError: A checkpoint that is damaged, or `step` is not there.
    """
    folder = Path(model)
    if (folder / RECORD).is_file():
        return Record.read(folder).expert_bias
    directory = weights_directory(model, step)
    if directory is None or not (is_dcp(directory) or is_engine(directory)):
        return False  # Hugging Face has no name for it
    with open_checkpoint(directory) as checkpoint:
        return any(name.endswith(_EXPERT_BIAS) for name in checkpoint.tensors)


def check_weights(directory: Path, family: Family, hf: Mapping[str, Any], buffers: Mapping[str, Any]) -> None:
    """Hold names, shapes, types and lengths in a checkpoint's headers against its config; reads no weight.

    Args:
        directory: From `weights_directory`.
        buffers: FQNs that the model has besides Hugging Face's tensors (expert bias).

    Raises:
        BridgeError: A damaged file, or every missing, unexpected or mis-shaped tensor in one line.
    """
    with open_checkpoint(directory) as checkpoint:
        check_source(checkpoint, family, hf, buffers)
