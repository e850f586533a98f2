"""Open whatever checkpoint lies in a directory; what is not read is refused with what to do instead."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.dcp import is_dcp, open_dcp
from titan_bridge.checkpoint.hf import is_hf, open_hf
from titan_bridge.checkpoint.quantized import dequantized
from titan_bridge.checkpoint.torch_checkpointing import is_torch_checkpointing, open_torch_checkpointing
from titan_bridge.errors import BridgeError, few
from titan_bridge.models import family_for

_COPY = {  # by scheme: what brings a folder here
    "s3": "aws s3 cp --recursive {} DIR",
    "gs": "gcloud storage cp --recursive {} DIR",
    "hf": "hf download NAME --local-dir DIR",
    "az": "azcopy copy {} DIR --recursive",
}
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}[^/]", re.IGNORECASE)  # Path() makes one slash of two


def is_checkpoint(directory: Path) -> bool:
    """Whether a checkpoint of any known format lies there."""
    return any(known(directory) for known in (is_dcp, is_hf, is_torch_checkpointing))


def open_checkpoint(
    path: str | os.PathLike[str], *, extra: bool = False, names: str | None = None
) -> Checkpoint:
    """Open a directory: DCP, Hugging Face safetensors, or files of torch_checkpointing, in this order of looking.

    Headers are read and checked in full; no weight is read. Quantized weights are presented multiplied out.

    Args:
        extra: Look up optimizer state and other entries that are no model tensors, too (not in Hugging Face's files).
        names: How the files call the tensor NAME, with `{}` in place of NAME; what does not fit is left out.

    Raises BridgeError: no such directory, no checkpoint in it, or one that is damaged; the message names the file.
    """
    if names is not None and (names.count("{}") != 1 or names == "{}"):
        raise BridgeError(
            f"--names {names!r}; write how the checkpoint calls the tensor NAME with {{}} in place of NAME, for "
            "example 'model.{}'"
        )
    refuse_remote(os.fspath(path))
    directory = Path(path)
    if not directory.is_dir():
        what = "is a file; give its directory" if directory.is_file() else "does not exist"
        raise BridgeError(f"{directory} {what}")
    if is_dcp(directory):
        found = open_dcp(directory, extra=extra or names is not None)
    elif is_hf(directory):
        found = open_hf(directory)
    elif is_torch_checkpointing(directory):
        found = open_torch_checkpointing(directory, extra=extra or names is not None)
    else:
        refuse_folder(directory)
    if names is not None:
        found = _renamed(found, names)
    if found.format == "hf":
        return dequantized(found, found.config, directory / "config.json")
    return under_hf_names(found, found.config)


def named(name: str, pattern: str) -> str | None:
    """Our name of a tensor, None where the pattern does not fit."""
    before, after = pattern.split("{}")
    fits = name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
    return name[len(before) : len(name) - len(after)] if fits else None


def _renamed(checkpoint: Checkpoint, pattern: str) -> Checkpoint:
    """The tensors that a pattern fits, under our names; what does not fit is left out."""
    own = [*checkpoint.tensors.values(), *checkpoint.extra_tensors.values()]
    found = {new: replace(one, name=new) for one in own if (new := named(one.name, pattern)) is not None}
    if not found:
        names = few([tensor.name for tensor in own])
        raise BridgeError(f"--names {pattern!r} fits no tensor of {checkpoint.path}; it has {names}")
    left_out = checkpoint.left_out + len(checkpoint.blobs) + len(own) - len(found)
    return replace(
        checkpoint, tensors=found, extra_tensors={}, blobs={}, paths={}, elsewhere=(), left_out=left_out
    )


def under_hf_names(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> Checkpoint:
    """A DCP whose tensors have Hugging Face's names, as trainers of transformers' own models write it, as such."""
    if checkpoint.format != "dcp" or config is None:
        return checkpoint
    try:
        names = {view.name for view in family_for(config).views(config)}
    except BridgeError:
        return checkpoint
    return replace(checkpoint, format="hf") if names <= checkpoint.tensors.keys() else checkpoint


def refuse_remote(path: str | Path) -> None:
    """Raise BridgeError for `s3://...` and the like: slices are read in place, from files of this machine."""
    match = _SCHEME.match(str(path))
    if match is None or Path(path).exists():
        return
    address = re.sub(r":/+", "://", str(path), count=1)
    how = _COPY.get(match[1].lower(), "copy the folder to this machine").format(address)
    raise BridgeError(f"{address} is remote, which is not read; fetch it first ({how}) and give DIR")


def refuse_folder(directory: Path) -> NoReturn:
    """Raise BridgeError for a folder in which no checkpoint that we read was found."""
    found = few(sorted(path.name for path in directory.iterdir()))
    what = (
        f"holds no checkpoint (found: {found}); looked for .metadata (DCP), model.safetensors and "
        "model.safetensors.index.json (Hugging Face)"
    )
    if binary := sorted(path.name for path in directory.glob("*.bin")):
        what = (
            f"holds pickles ({few(binary)}), which are not read, since a pickle can run code; convert them where you "
            "trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) writes safetensors"
        )
    elif any(directory.glob("*.pt")) or any(directory.glob("rank_*/*.pt")):
        what = (
            f"was written by torch.save ({found}), which is not read but for the item 'model' of torch_checkpointing "
            "(model_0.pt); have TorchTitan write DCP (its default checkpointer)"
        )
    elif any(directory.glob("shard-*.safetensors")):
        what = (
            f"holds the parts that each rank saved ({found}), which are not read; put them together with "
            "torch.distributed.checkpoint._consolidate_hf_safetensors.consolidate_safetensors_files"
        )
    raise BridgeError(f"{directory} {what}")
