"""What the engines have of this rank's tensors, and what has changed since.

Comparison is bit by bit (NaNs and signed zeros count), in the dtypes in which the engines keep the tensors: of a
float32 master of a bfloat16 weight exactly those changes are sent that the engine would see. Nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from titan_bridge.transfer.messages import Bucket, Slice
from titan_bridge.transfer.wire import Key

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK = 1 << 24  # elements compared at a time: bounds the memory of the comparison
_SAMPLE = 1 << 12  # elements of each tensor that are looked at before all are compared
_POSITION = torch.int32
_POSITION_BYTES = _COUNT_BYTES = 4

Local = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What changed in the messages to one worker."""

    counts: torch.Tensor  # int32 `[slices of all messages, in order]`: elements that changed in each
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """For each message: int32 row-major positions in the windows of its slices, one after the other, and the values."""

    def tensors(self) -> list[torch.Tensor]:
        """In the order in which they travel."""
        return [self.counts, *(tensor for part in self.parts if len(part[0]) for tensor in part)]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


class Snapshot:
    """This rank's local tensors as the engines have them, in each dtype that an engine keeps them in."""

    def __init__(self) -> None:
        self.base: str | None = None  # `protocol.base_of` the update that left them so, if that is known
        self._kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, local: Local, messages: Iterable[Sequence[Bucket]], base: str | None = None) -> None:
        """Take what these messages are made of as it is now, in the memory that is there."""
        self.base, all_of = base, (bucket for buckets in messages for bucket in buckets)
        wanted = {(part.name, bucket.dtype) for bucket in all_of for part in bucket.slices}
        self._kept = {key: kept for key, kept in self._kept.items() if key in wanted}
        for name, dtype in wanted:
            if (kept := self._kept.get((name, dtype))) is None:
                contiguous = torch.contiguous_format
                self._kept[name, dtype] = local[name].to(dtype, copy=True, memory_format=contiguous)
            else:
                kept.copy_(local[name])

    def deltas(self, local: Local, messages: Mapping[Key, Sequence[Bucket]]) -> dict[Key, Delta]:
        """What has changed for each worker; without those for whom all of it takes no more bytes."""
        left: dict[Key, int] = {}
        found: dict[Key, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        uses: dict[tuple[str, torch.dtype], list[tuple[Key, int, Slice]]] = {}
        for key, buckets in messages.items():
            slices = [(bucket.dtype, part) for bucket in buckets for part in bucket.slices]
            left[key] = sum(bucket.nbytes for bucket in buckets) - _COUNT_BYTES * len(slices)
            found[key] = [_NOTHING] * len(slices)
            for at, (dtype, part) in enumerate(slices):
                uses.setdefault((part.name, dtype), []).append((key, at, part))
        if not uses.keys() <= self._kept.keys() or self._most_changed(local, uses):
            return {}
        for (name, dtype), users in uses.items():
            if not any(left[key] > 0 for key, *_ in users):
                continue
            now = local[name].contiguous()
            blocks = (tensor.view(-1).split(BLOCK) for tensor in (self._kept[name, dtype], now))
            mask = torch.cat([_differ(old, new.to(dtype)) for old, new in zip(*blocks, strict=True)])
            for key, at, part in users:
                if left[key] <= 0:
                    continue
                positions = part.window.of(mask.view(now.shape)).reshape(-1).nonzero().view(-1)
                values = now.view(-1)[part.flat(positions)].to(dtype)
                left[key] -= len(positions) * (_POSITION_BYTES + dtype.itemsize)
                found[key][at] = (positions.to(_POSITION).cpu(), values.cpu())
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


def _differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    bits = BITS[a.element_size()]
    return a.contiguous().view(bits) != b.contiguous().view(bits)


_NOTHING = (torch.zeros(0, dtype=_POSITION), torch.zeros(0))


def _joined(buckets: Sequence[Bucket], found: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Delta:
    parts, left = [], iter(found)
    for bucket in buckets:
        slices = [next(left) for _ in bucket.slices]
        positions = torch.cat([positions for positions, _ in slices])
        parts.append((positions, torch.cat([values.to(bucket.dtype) for _, values in slices])))
    counts = [len(positions) for positions, _ in found]
    return Delta(counts=torch.tensor(counts, dtype=torch.int32), parts=parts)
