"""A checkpoint of any format straight into the live tensors of one rank: only its own boxes are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.mapping import check_source, make_mapping
from titan_bridge.cpu import unbound_cpus
from titan_bridge.sharding.layout import Layout
from titan_bridge.sharding.moves import Copy
from titan_bridge.sharding.plan import plan

if TYPE_CHECKING:
    from titan_bridge.models import Family

_THREADS = 8
"""Most files or parts that one rank reads at the same time."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What one rank took."""

    bytes_planned: int
    """Bytes, in the checkpoint's dtypes, of the boxes that this rank holds."""
    bytes_wanted: int
    """Bytes that were asked of the files; equal to `bytes_planned`."""
    bytes_read: int
    """Bytes that came from the files; more by small gaps that are cheaper to read than to skip."""
    bytes_total: int
    """Bytes of the whole model in the checkpoint."""


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
) -> Loaded:
    """Fill `live` (this rank's local tensors by FQN of the live model, contiguous) in place.

    Args:
        layout: Where every rank's slices lie.
        rank: This rank in the layout's meshes.
        family, hf, padded_vocab: What the checkpoint's names and shapes mean.
        buffers: FQNs among `live` that Hugging Face does not know (expert bias).

    Raises:
        BridgeError: Missing, unexpected, mis-shaped or wrongly typed tensors, all of them in one line, before
            anything is written; a file that ends early.
    """
    check_source(checkpoint, family, hf, buffers)
    # No buffers: what is the same on both sides needs no view.
    mapping = make_mapping(
        checkpoint, family, hf, "engine", dtype=None, buffers={}, padded_vocab=padded_vocab
    )
    # Padding of the vocabulary is in no checkpoint, and a buffer may be missing.
    work = plan(checkpoint.held(), layout, mapping.views, allow_missing=True)
    copies = sorted(work.copies(destination=rank), key=lambda copy: _place(checkpoint, copy))
    before = checkpoint.pool.bytes_wanted, checkpoint.pool.bytes_read

    def fetch(copy: Copy) -> None:
        checkpoint.fetch(copy, copy.destination_window.of(live[copy.destination_name]))

    own, cpus = os.sched_getaffinity(0), unbound_cpus()
    count = min(_THREADS, len(own) if cpus == own else len(cpus) // len(layout.ranks))
    if count <= 1:
        for copy in copies:
            fetch(copy)
    else:  # one thread does not keep a disk busy, nor touch new memory as fast as a file is read
        with ThreadPoolExecutor(
            count, "load", initializer=os.sched_setaffinity, initargs=(0, cpus)
        ) as threads:
            for done in [threads.submit(fetch, copy) for copy in copies]:
                done.result()
    return Loaded(
        bytes_planned=sum(c.elements * checkpoint.tensor(c.source_name).dtype.itemsize for c in copies),
        bytes_wanted=checkpoint.pool.bytes_wanted - before[0],
        bytes_read=checkpoint.pool.bytes_read - before[1],
        bytes_total=checkpoint.nbytes,
    )


def _place(checkpoint: Checkpoint, copy: Copy) -> tuple[str, int]:
    """In the order of the files, so that the disk is read forwards."""
    assert copy.source_chunk is not None
    chunk = checkpoint.tensor(copy.source_name).chunks[copy.source_chunk]
    return str(chunk.path), chunk.offset + copy.source_window.offset
