"""Names that another program gave: a pattern with `{}` leads from them to ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.errors import BridgeError, few
from titan_bridge.models import family_for

HOLE = "{}"


def check_pattern(pattern: str) -> None:
    """Raise BridgeError unless a pattern has exactly one `{}`."""
    if pattern.count(HOLE) != 1 or pattern == HOLE:
        raise BridgeError(
            f"--names {pattern!r}; write how the checkpoint calls the tensor NAME with {{}} in place of NAME, for "
            "example 'model.{}'"
        )


def named(name: str, pattern: str) -> str | None:
    """Our name of a tensor, None where the pattern does not fit."""
    before, after = pattern.split(HOLE)
    fits = name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
    return name[len(before) : len(name) - len(after)] if fits else None


def renamed(checkpoint: Checkpoint, pattern: str) -> Checkpoint:
    """The tensors that a pattern fits, under our names; what does not fit is left out.
    Raises BridgeError: no tensor fits it."""
    own = [*checkpoint.tensors.values(), *checkpoint.extra_tensors.values()]
    found = {new: replace(one, name=new) for one in own if (new := named(one.name, pattern)) is not None}
    if not found:
        raise BridgeError(
            f"--names {pattern!r} fits no tensor of {checkpoint.path}; it has {few([t.name for t in own])}"
        )
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
