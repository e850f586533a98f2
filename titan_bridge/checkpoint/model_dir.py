"""A model directory: config.json, tokenizer files, and weights in any format that we read.

The weights lie in the directory itself, or, for a training run, in its `step-N` folders (see `run_folder`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.hf import is_hf
from titan_bridge.checkpoint.mapping import EXPERT_BIAS, Config, check_source, expected
from titan_bridge.checkpoint.open import is_checkpoint, named, open_checkpoint
from titan_bridge.run_folder import RECORD, Record, model_and_step, step_folder

if TYPE_CHECKING:
    from titan_bridge.models import Family

LOAD_FORMAT = "titan"  # vLLM's `load_format` for weights that we read


def weights_directory(model: str, step: int | None = None) -> Path | None:
    """Where the weights lie that a path means; None when there is nothing that we read (another format, a hub's name).

    Args:
        model: A model folder, or a training run, its checkpoint folder, or one step in that.
        step: Of a training run; None takes the path's own, or the last whole one.

    Raises BridgeError: `step` is not there, or not whole.
    """
    if not Path(model).is_dir():
        return None
    folder, step = model_and_step(model, step)
    if step is not None:
        return step_folder(Path(folder), step)
    return Path(folder) if is_checkpoint(Path(folder)) else None


def has_expert_bias(model: str, step: int | None = None, names: str | None = None) -> bool:
    """Whether the weights come with TorchTitan's load-balancing bias, which routes in serving, too.
    Arguments are those of `weights_directory` and `open_checkpoint`, and so are errors."""
    directory = weights_directory(model, step)
    if directory is None or is_hf(directory):
        return False  # Hugging Face has no name for it
    if (directory.parent / RECORD).is_file():
        return Record.read(directory.parent).expert_bias
    with open_checkpoint(directory, names=names) as checkpoint:
        return any(name.endswith(EXPERT_BIAS) for name in checkpoint.tensors)


def open_named_either_way(directory: Path, names: str | None, family: Family, hf: Config) -> Checkpoint:
    """Open a checkpoint of one model whose names the pattern fits, or which has our names already.
    The pattern comes first: where live weights lie beside averaged ones, it says which are meant.
    Raises BridgeError: as `open_checkpoint`; of a checkpoint that fits neither way, what the pattern finds in it."""
    if names is not None:
        with open_checkpoint(directory, extra=True) as found:
            own = {*found.tensors, *found.extra_tensors}
        whole = [expected(family, hf, form).keys() for form in ("hf", "dcp")]
        behind = {named(name, names) for name in own}
        if any(model <= own for model in whole) and not any(model <= behind for model in whole):
            names = None
    return open_checkpoint(directory, names=names)


def check_weights(
    directory: Path, family: Family, hf: Config, buffers: Mapping[str, Any], names: str | None = None
) -> None:
    """Hold names, shapes, types and lengths in a checkpoint's headers against its config; reads no weight.
    `buffers`: FQNs that the model has besides Hugging Face's tensors (expert bias); `names` as for `open_checkpoint`.
    Raises BridgeError: a damaged file, or every missing, unexpected or mis-shaped tensor in one line."""
    with open_checkpoint(directory, names=names) as checkpoint:
        check_source(checkpoint, family, hf, buffers)
