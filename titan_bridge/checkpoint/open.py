"""Open whatever checkpoint lies in a directory."""

from __future__ import annotations

import os
from pathlib import Path

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.dcp import is_dcp, open_dcp
from titan_bridge.checkpoint.engine_files import is_engine, open_engine
from titan_bridge.checkpoint.hf import is_hf, open_hf
from titan_bridge.checkpoint.quantized import dequantized
from titan_bridge.errors import BridgeError, few


def is_checkpoint(directory: Path) -> bool:
    """Whether a checkpoint of any known format lies there."""
    return any(known(directory) for known in (is_dcp, is_engine, is_hf))


def open_checkpoint(path: str | os.PathLike[str], *, extra: bool = False) -> Checkpoint:
    """Open a directory: DCP, engine files or Hugging Face safetensors, in this order of looking.

    Headers are read and checked in full; no weight is read. Quantized weights are presented multiplied out.

    Args:
        extra: DCP: look up optimizer state and other entries that are no model tensors, too.

    Raises:
        BridgeError: No such directory, no checkpoint in it, or one that is damaged; the message names the file.
    """
    directory = Path(path)
    if not directory.is_dir():
        what = "is a file; give its directory" if directory.is_file() else "does not exist"
        raise BridgeError(f"{directory} {what}")
    if is_dcp(directory):
        return open_dcp(directory, extra=extra)
    if is_engine(directory):
        return open_engine(directory)
    if is_hf(directory):
        return dequantized(open_hf(directory))
    found = few(sorted(path.name for path in directory.iterdir()))
    if any(directory.glob("*.pt")):
        raise BridgeError(
            f"{directory} was written by torch_checkpointing or torch.save ({found}), which is not read; have "
            "TorchTitan write DCP (its default checkpointer)"
        )
    if any(directory.glob("shard-*.safetensors")):
        raise BridgeError(
            f"{directory} holds the parts that each rank saved ({found}), which are not read; put them together with "
            "torch.distributed.checkpoint._consolidate_hf_safetensors.consolidate_safetensors_files"
        )
    raise BridgeError(
        f"{directory} holds no checkpoint (found: {found}); looked for .metadata (DCP), engine.json (engine files), "
        f"model.safetensors and model.safetensors.index.json (Hugging Face)"
    )
