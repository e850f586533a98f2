"""Fingerprints of what a trainer rank sent to a worker, computed at both ends from the same messages.

Both ends know which elements each slice of each message has, in which order, and in which dtype; so each counts them
through, and equal sums say that what is live is what the trainer has, element for element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from titan_bridge.fingerprint import combine, partial
from titan_bridge.sharding.moves import Window
from titan_bridge.transfer.messages import Bucket
from titan_bridge.transfer.snapshot import Local

_ROW = 1024  # elements that are counted as one row: whole rows are quick to sum up
_RANK = 1 << 40  # rows of the messages of one trainer rank: elements of two ranks have different numbers


def of_messages(messages: Mapping[int, Sequence[Bucket]], local: Local) -> dict[str, int]:
    """By name of the engine's tensor; the sum over all trainer ranks is that of the tensor on this worker.

    `messages` of one worker, by trainer rank; `local` tensors of either end, those that it lacks are left out.
    """
    sums: dict[str, int] = {}
    for rank, buckets in messages.items():
        row = rank * _RANK
        for bucket in buckets:
            for part in bucket.slices:
                if part.name in local:
                    flat = part.window.of(local[part.name].contiguous()).reshape(-1)
                    sums[part.served] = combine((sums.get(part.served, 0), _of(flat, row, bucket.dtype)))
                row += -(-part.elements // _ROW)
    return sums


def _of(flat: torch.Tensor, row: int, dtype: torch.dtype) -> int:
    """Of elements that fill rows, from this one on."""
    rows, rest = divmod(len(flat), _ROW)
    full = Window(size=(rows, _ROW), stride=(_ROW, 1), offset=row * _ROW)
    last = Window(size=(rest,), stride=(1,), offset=(row + rows) * _ROW)
    parts = ((flat[: rows * _ROW].view(rows, _ROW), full), (flat[rows * _ROW :], last))
    return combine(partial(part, window, (1 << 62, _ROW), dtype) for part, window in parts if len(part))
