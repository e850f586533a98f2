"""What the engines have of this rank's tensors, and what has changed since.

Comparison is bit by bit (NaNs and signed zeros count), in the dtypes in which the engines keep the tensors: of a
float32 master of a bfloat16 weight exactly those changes are sent that the engine would see. Nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from titan_bridge.transfer.messages import Bucket, Slice
from titan_bridge.transfer.wire import Key

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK = 1 << 24
"""Elements compared at a time: bounds the memory of the comparison."""
_SAMPLE = 1 << 12
"""Elements of each tensor that are looked at before all are compared."""
_POSITION = torch.int32
_POSITION_BYTES = _COUNT_BYTES = 4

Local = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What changed in the messages to one worker."""

    counts: torch.Tensor
    """int32 `[slices of all messages, in order]`: elements that changed in each."""
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """For each message: int32 row-major positions in the windows of its slices, one after the other, and the values."""

    @property
    def nbytes(self) -> int:
        return self.counts.nbytes + sum(positions.nbytes + values.nbytes for positions, values in self.parts)


class Snapshot:
    """This rank's local tensors as the engines have them, in each dtype that an engine keeps them in."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept.values())

    def take(self, local: Local, messages: Iterable[Sequence[Bucket]]) -> None:
        """Take what these messages are made of as it is now, in the memory that is there."""
        wanted = {
            (part.name, bucket.dtype) for buckets in messages for bucket in buckets for part in bucket.slices
        }
        self._kept = {key: kept for key, kept in self._kept.items() if key in wanted}
        for name, dtype in wanted:
            if (kept := self._kept.get((name, dtype))) is None:
                self._kept[name, dtype] = local[name].to(
                    dtype, copy=True, memory_format=torch.contiguous_format
                )
            else:
                kept.copy_(local[name])

    def deltas(self, local: Local, messages: Mapping[Key, Sequence[Bucket]]) -> dict[Key, Delta]:
        """What has changed for each worker; without those for whom all of it takes no more bytes."""
        left = {key: sum(bucket.nbytes for bucket in buckets) for key, buckets in messages.items()}
        found: dict[Key, list[list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        uses: dict[tuple[str, torch.dtype], list[tuple[Key, int, int, Slice]]] = {}
        for key, buckets in messages.items():
            found[key] = [[_NOTHING] * len(bucket.slices) for bucket in buckets]
            left[key] -= _COUNT_BYTES * sum(len(bucket.slices) for bucket in buckets)
            for number, bucket in enumerate(buckets):
                for at, part in enumerate(bucket.slices):
                    uses.setdefault((part.name, bucket.dtype), []).append((key, number, at, part))
        if not uses.keys() <= self._kept.keys() or self._most_changed(local, uses):
            return {}
        for (name, dtype), parts in uses.items():
            if not any(left[key] > 0 for key, *_ in parts):
                continue
            now = local[name].contiguous()
            mask = (
                torch.cat([*_masks(self._kept[name, dtype], now)]) if now.numel() else now.new_empty(0).bool()
            )
            for key, number, at, part in parts:
                if left[key] <= 0:
                    continue
                positions = part.window.of(mask.view(now.shape)).reshape(-1).nonzero().view(-1)
                values = now.view(-1)[part.flat(positions)].to(dtype)
                left[key] -= len(positions) * (_POSITION_BYTES + dtype.itemsize)
                found[key][number][at] = (positions.to(_POSITION).cpu(), values.cpu())
        return {key: _joined(messages[key], found[key]) for key in messages if left[key] > 0}

    def _most_changed(self, local: Local, uses: Iterable[tuple[str, torch.dtype]]) -> bool:
        """Whether a sample says that a delta is no smaller, so that nobody needs to look for it."""
        delta = whole = 0.0
        for name, dtype in uses:
            kept = self._kept[name, dtype].view(-1)
            step = max(1, len(kept) // _SAMPLE)
            now = local[name].reshape(-1)[::step].to(dtype)
            part = _differ(kept[::step], now).float().mean().item() if len(now) else 0.0
            delta += part * len(kept) * (_POSITION_BYTES + dtype.itemsize)
            whole += len(kept) * dtype.itemsize
        return delta > 1.2 * whole


def _masks(old: torch.Tensor, new: torch.Tensor) -> Iterator[torch.Tensor]:
    old, new = old.view(-1), new.view(-1)
    for first in range(0, len(new), BLOCK):
        part = old[first : first + BLOCK]
        yield _differ(part, new[first : first + BLOCK].to(part.dtype))


def _differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    bits = BITS[a.element_size()]
    return a.contiguous().view(bits) != b.contiguous().view(bits)


_NOTHING = (torch.zeros(0, dtype=_POSITION), torch.zeros(0))


def _joined(buckets: Sequence[Bucket], found: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> Delta:
    parts = []
    for bucket, slices in zip(buckets, found, strict=True):
        positions = torch.cat([positions for positions, _ in slices])
        parts.append((positions, torch.cat([values.to(bucket.dtype) for _, values in slices])))
    counts = [len(positions) for slices in found for positions, _ in slices]
    return Delta(counts=torch.tensor(counts, dtype=torch.int32), parts=parts)
