"""A checkpoint of any format straight into the live tensors of one rank: only its own boxes are read."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.finite import count_not_finite
from titan_bridge.checkpoint.mapping import check_source, live_views
from titan_bridge.cpu import WORKERS, unbound_cpus
from titan_bridge.sharding.layout import Layout, dtype_name
from titan_bridge.sharding.moves import Copy
from titan_bridge.sharding.plan import plan

if TYPE_CHECKING:
    from titan_bridge.models import Family

_THREADS = 8  # most weights that one rank reads at the same time
_AHEAD = 2  # weights a thread that may be done or under way before what was begun first is told


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What one rank took."""

    bytes_planned: int  # bytes, in the checkpoint's dtypes, of the boxes that this rank holds
    bytes_read: int  # bytes that came from the files; equal to `bytes_planned`
    bytes_total: int  # bytes of the whole model in the checkpoint
    dtypes: tuple[str, ...]  # types of the checkpoint's tensors, in order of their names
    nan: Mapping[str, int]
    """Elements that are NaN in live tensors of this rank, by FQN; those without any are left out."""
    inf: Mapping[str, int]
    """The same of infinite ones, those included that were too large for the live tensor's dtype."""


def load_into(
    checkpoint: Checkpoint,
    live: Mapping[str, torch.Tensor],
    layout: Layout,
    rank: int,
    *,
    family: Family,
    hf: Mapping[str, Any],
    padded_vocab: int,
    buffers: Mapping[str, Any],
    begin: Callable[..., None] = lambda fqn, *, whole: None,
    arrived: Callable[[str], None] = lambda fqn: None,
) -> Loaded:
    """Fill `live` (this rank's local tensors by FQN of the live model, contiguous) in place.

    Args:
        layout, rank: Where every rank's slices lie, and this rank in its meshes.
        family, hf, padded_vocab: What the checkpoint's names and shapes mean.
        buffers: FQNs among `live` that Hugging Face does not know (expert bias).
        begin: Called with each FQN before the first byte of it is read, and whether all of it will be (`whole`, a bool:
            padding is in no checkpoint). May replace the memory of `live[fqn]`.
        arrived: Called with each FQN of which something is read, once all of it is in its place.

    Raises BridgeError: missing, unexpected, mis-shaped or wrongly typed tensors, all of them in one line, and damaged
    archives, before anything is written; a file that ends early.
    """
    check_source(checkpoint, family, hf, buffers)
    views = live_views(checkpoint.format, family, hf, padded_vocab)
    # Padding of the vocabulary is in no checkpoint, and a buffer may be missing.
    work = plan(checkpoint.tensors.values(), layout, views, allow_missing=True)
    copies = sorted(work.copies(destination=rank), key=lambda copy: _place(checkpoint, copy))
    # Read forwards: a weight that is spread over files, where its first part is.
    parts: dict[str, list[Copy]] = {}
    for copy in copies:
        checkpoint.locate(*checkpoint.source_of(copy))  # what is damaged is found before anything is written
        parts.setdefault(copy.destination_name, []).append(copy)
    before, counts = checkpoint.bytes_read, {}

    def fill(fqn: str) -> tuple[int, int]:
        for copy in parts[fqn]:
            checkpoint.fetch(copy, copy.destination_window.of(live[fqn]))
        return count_not_finite(live[fqn])

    def finish(fqn: str, done: Callable[[], tuple[int, int]]) -> None:
        counts[fqn] = done()
        arrived(fqn)

    cpus = unbound_cpus()
    count = _threads(cpus, len(layout.ranks))
    ahead: deque[tuple[str, Callable[[], tuple[int, int]]]] = deque()
    # One thread does not keep a disk busy, nor touch new memory as fast as a file is read.
    with ThreadPoolExecutor(max(count, 1), "load", os.sched_setaffinity, (0, cpus)) as threads:
        for fqn, own in parts.items():
            begin(fqn, whole=sum(copy.elements for copy in own) == live[fqn].numel())
            if count <= 1:
                finish(fqn, partial(fill, fqn))
                continue
            ahead.append((fqn, threads.submit(fill, fqn).result))
            if len(ahead) == _AHEAD * count:
                finish(*ahead.popleft())
        while ahead:
            finish(*ahead.popleft())
    return Loaded(
        bytes_planned=sum(c.elements * checkpoint.tensor(c.source_name).dtype.itemsize for c in copies),
        bytes_read=checkpoint.bytes_read - before,
        bytes_total=checkpoint.nbytes,
        dtypes=tuple(sorted({dtype_name(stored.dtype) for stored in checkpoint.tensors.values()})),
        nan={fqn: nan for fqn, (nan, _) in counts.items() if nan},
        inf={fqn: inf for fqn, (_, inf) in counts.items() if inf},
    )


def _threads(cpus: frozenset[int], ranks: int) -> int:
    """How many read at a time; a core is left to whoever is told what arrived, and packs it meanwhile."""
    own = len(cpus) if cpus == os.sched_getaffinity(0) else len(cpus) // int(os.environ.get(WORKERS, ranks))
    return min(_THREADS, own - 1)


def _place(checkpoint: Checkpoint, copy: Copy) -> tuple[str, int]:
    _, chunk = checkpoint.source_of(copy)
    return str(chunk.path), chunk.offset + copy.source_window.offset
