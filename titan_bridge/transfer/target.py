"""What a worker receives into: its live weights, and what has to happen when they change."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from titan_bridge.sharding.layout import Layout
from titan_bridge.sharding.view import View

_SAMPLE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The live weights of one worker."""

    tensors: Callable[[], Mapping[str, torch.Tensor]]
    """The live local tensors by name, as they are now."""
    layout: Layout
    """Of the worker's own world (one engine's ranks)."""
    rank: int
    """In `layout`."""
    index: int
    """Of this worker among all workers of the engine, its data-parallel groups included."""
    agree: Callable[[Sequence[int]], Sequence[int]] = list
    """The least of what the workers that step together say, number by number: the vote inside a commit."""
    on_change: Callable[[Iterable[str], Any], None] = lambda names, ahead: None
    """Called with the names of the live tensors that were written, and with what `ahead` returned."""
    views: Callable[[], Sequence[View]] = lambda: ()
    """Hugging Face names as slices of the tensors, or the reverse."""
    unpadded: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Rows without padding, of tensors that have some."""
    whole: Mapping[str, torch.dtype] = dataclasses.field(default_factory=dict)
    """Tensors of the layout that have no live tensor here: all of them arrive whole and go to `load`."""
    load: Callable[[Mapping[str, torch.Tensor]], None] = lambda tensors: None
    """Makes live what the whole tensors say; called with all of them. A target with some takes no deltas."""
    swap: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None
    """Gives live tensors other memory of their shape and dtype, where nobody holds addresses; returns what they had."""
    ahead: Callable[[Mapping[str, torch.Tensor]], Any] = lambda tensors: None
    """Called while the engine goes on, with what `swap` is going to be given: makes what a commit need not wait for."""
    memory: Callable[..., torch.Tensor] = torch.empty_like
    """`memory(tensor on meta, device=)` makes what `swap` is given and what waits for a commit. What `torch.empty_like`
    makes may stay with the process when it is freed, once for each thread that has made some."""


def unshared(live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that are alone in their memory: tied ones must go on to share theirs."""
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in live.values())
    return {name: t for name, t in live.items() if users[t.untyped_storage().data_ptr()] == 1}


def signature(tensor: torch.Tensor) -> tuple:
    """What must not change between the plan and an update."""
    return str(tensor.dtype), tuple(tensor.shape), tensor.is_contiguous()


def sample_digest(live: Mapping[str, torch.Tensor]) -> str:
    """Of up to 256 elements of every tensor: tells whether somebody else has loaded other weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(live):
        flat = live[name].detach().view(-1)
        part = flat[:: max(1, len(flat) // _SAMPLE)].contiguous().cpu()
        digest.update(part.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
