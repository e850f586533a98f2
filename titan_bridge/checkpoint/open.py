"""Open whatever checkpoint lies in a directory."""

from __future__ import annotations

import os
from pathlib import Path

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.dcp import is_dcp, open_dcp
from titan_bridge.checkpoint.hf import is_hf, open_hf
from titan_bridge.checkpoint.names import check_pattern, renamed, under_hf_names
from titan_bridge.checkpoint.quantized import dequantized
from titan_bridge.checkpoint.refused import refuse_folder, refuse_remote
from titan_bridge.errors import BridgeError


def is_checkpoint(directory: Path) -> bool:
    """Whether a checkpoint of any known format lies there."""
    return any(known(directory) for known in (is_dcp, is_hf))


def open_checkpoint(
    path: str | os.PathLike[str], *, extra: bool = False, names: str | None = None
) -> Checkpoint:
    """Open a directory: DCP or Hugging Face safetensors, in this order of looking.

    Headers are read and checked in full; no weight is read. Quantized weights are presented multiplied out.

    Args:
        extra: DCP: look up optimizer state and other entries that are no model tensors, too.
        names: How the files call the tensor NAME, with `{}` in place of NAME; what does not fit is left out.

    Raises:
        BridgeError: No such directory, no checkpoint in it, or one that is damaged; the message names the file.
    """
    if names is not None:
        check_pattern(names)
    refuse_remote(os.fspath(path))
    directory = Path(path)
    if not directory.is_dir():
        what = "is a file; give its directory" if directory.is_file() else "does not exist"
        raise BridgeError(f"{directory} {what}")
    if is_dcp(directory):
        found = open_dcp(directory, extra=extra or names is not None)
    elif is_hf(directory):
        found = open_hf(directory)
    else:
        refuse_folder(directory)
    if names is not None:
        found = renamed(found, names)
    return dequantized(found) if found.format == "hf" else under_hf_names(found, found.config)
