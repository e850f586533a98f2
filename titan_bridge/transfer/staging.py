"""Where a worker keeps an update until it is taken: in the host's memory, beside the live weights.

Whole messages lie in buckets, or, where a target lets its tensors' memory be exchanged, where they belong in a shadow
of the tensor that then takes its place, and whose old memory is the staging of the next update. A delta is kept as it
came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from titan_bridge.sharding.show import human
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.messages import Bucket
from titan_bridge.transfer.snapshot import Local
from titan_bridge.transfer.target import Target, unshared
from titan_bridge.transfer.transports import Tcp
from titan_bridge.transfer.wire import Deadline

Messages = Mapping[int, Sequence[Bucket]]
"""What a worker gets from each trainer rank."""


@dataclass(kw_only=True)
class Staged:
    """One update that has arrived, ready to be written."""

    whole: list[tuple[Bucket, torch.Tensor]] = field(default_factory=list)
    delta: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Name, int64 positions in the flat local tensor, values."""
    nbytes: int = 0
    """Bytes that came."""


class Staging:
    """The memory for the messages of one worker; kept for the next update."""

    def __init__(self, messages: Messages, target: Target, live: Local) -> None:
        self._messages, self._target = messages, target
        self.device = device = next(iter(live.values())).device if live else torch.device("cpu")
        """Of the live weights."""
        self._pin = device.type == "cuda"
        self._senders: dict[str, set[int]] = {}
        arriving: Counter[str] = Counter()
        for rank, bucket in self._all():
            for part in bucket.slices:
                self._senders.setdefault(part.name, set()).add(rank)
                arriving[part.name] += part.elements
        self._shadowable: Local = {}
        if target.swap and device.type == "cpu":
            alone = unshared(live).items()
            self._shadowable = {name: t.to("meta") for name, t in alone if 0 < arriving[name] == t.numel()}
        self._buckets: dict[Bucket, torch.Tensor] = {}
        self._passing: dict[int, torch.Tensor] = {}
        """By trainer rank: memory for messages that are copied to where they belong as they arrive."""
        self._shadows: dict[str, torch.Tensor] = {}
        self._use: Local = {}
        """Shadows that the update under way fills."""

    def _all(self) -> Iterator[tuple[int, Bucket]]:
        return ((rank, bucket) for rank, buckets in self._messages.items() for bucket in buckets)

    @property
    def nbytes(self) -> int:
        """Memory that is held now."""
        held = (self._buckets, self._passing, self._shadows)
        return sum(tensor.nbytes for each in held for tensor in each.values())

    def prepare(self, whole: Collection[int]) -> None:
        """Make room for what trainer ranks `whole` send all of. Raises TransferError where there is no memory."""
        try:
            used = [name for name in self._shadowable if self._senders[name] <= set(whole)]
            for name in used:
                if name not in self._shadows:
                    self._shadows[name] = self._memory(self._shadowable[name])
            self._use = {name: self._shadows[name] for name in used}
            passing: dict[int, int] = {}
            for rank, bucket in self._all():
                if rank not in whole:
                    continue
                if not self._all_shadowed(bucket):
                    if bucket not in self._buckets:
                        like = torch.empty(bucket.elements, dtype=bucket.dtype, device="meta")
                        self._buckets[bucket] = self._memory(like)
                elif bucket.run is None:
                    passing[rank] = max(bucket.nbytes, passing.get(rank, 0))
            for rank, size in passing.items():
                if rank not in self._passing or self._passing[rank].nbytes < size:
                    self._passing[rank] = self._memory(torch.empty(size, dtype=torch.uint8, device="meta"))
        except (RuntimeError, MemoryError, OSError) as error:
            self._buckets, self._passing, self._shadows, self._use = {}, {}, {}, {}
            size = human(sum(bucket.nbytes for _, bucket in self._all()))
            raise TransferError(
                f"no memory on the host for {size} of new weights beside the live ones: {error}"
            ) from None

    def _memory(self, meta: torch.Tensor) -> torch.Tensor:
        if self._pin:
            return torch.empty_like(meta, device="cpu", pin_memory=True)
        return self._target.memory(meta, device=torch.device("cpu"))

    def _all_shadowed(self, bucket: Bucket) -> bool:
        return all(part.name in self._use for part in bucket.slices)

    def receive(self, rank: int, way: Tcp, number: int, whole: bool, deadline: Deadline) -> Staged:
        """All that trainer rank `rank` sends of update `number`. Raises TransferError; nothing live was touched."""
        head = way.head(deadline)
        if head != {"number": number, "kind": "whole" if whole else "delta"}:
            raise TransferError(f"{way.connection.peer} announced {head} in update {number}")
        staged = Staged()
        if whole:
            self._whole(rank, way, staged, deadline)
        else:
            self._delta(rank, way, staged, deadline)
        return staged

    def _whole(self, rank: int, way: Tcp, staged: Staged, deadline: Deadline) -> None:
        for bucket in self._messages[rank]:
            staged.nbytes += bucket.nbytes
            shadowed = self._all_shadowed(bucket)
            if shadowed and bucket.run is not None:
                way.receive(self._use[bucket.slices[0].name].view(-1)[bucket.run], deadline)
                continue
            if shadowed:
                data = self._passing[rank][: bucket.nbytes].view(bucket.dtype)
            else:
                staged.whole.append((bucket, data := self._buckets[bucket]))
            way.receive(data, deadline)
            _spread(bucket, data, self._use)

    def _delta(self, rank: int, way: Tcp, staged: Staged, deadline: Deadline) -> None:
        buckets, peer = self._messages[rank], way.connection.peer
        counts = torch.empty(sum(len(bucket.slices) for bucket in buckets), dtype=torch.int32)
        way.receive(counts, deadline)
        staged.nbytes += counts.nbytes
        left = iter(counts.tolist())
        for bucket in buckets:
            mine = [next(left) for _ in bucket.slices]
            for count, part in zip(mine, bucket.slices, strict=True):  # before any memory is asked for
                if not 0 <= count <= part.elements:
                    raise TransferError(
                        f"{peer} announced {count} of {part.elements} elements of {part.name}"
                    )
            if not (total := sum(mine)):
                continue
            positions = torch.empty(total, dtype=torch.int32)
            values = torch.empty(total, dtype=bucket.dtype)
            way.receive(positions, deadline)
            way.receive(values, deadline)
            staged.delta += located(peer, bucket, mine, positions, values)
            staged.nbytes += positions.nbytes + values.nbytes

    def ahead(self) -> Any:
        """What the target makes of an update that has arrived, before it is taken."""
        return self._target.ahead(self._use)

    def write(self, staged: Sequence[Staged], ahead: Any = None) -> None:
        """Make an update live, and tell the target what was written.

        Raises whatever a loader of the target's raises; the weights are then neither the old ones nor the new.
        """
        target, live = self._target, dict(self._target.tensors())
        params = target.layout.params
        loaded = {
            name: torch.empty(params[name].shape, dtype=dtype, device=self.device)
            for name, dtype in target.whole.items()
        }
        written = set(self._use)
        places = {name: tensor for name, tensor in (live | loaded).items() if name not in self._use}
        for each in staged:
            written |= _copy(each, places)
        if loaded:
            target.load(loaded)
        if self._use:
            assert target.swap is not None
            self._shadows |= target.swap(self._use)
        self._use = {}
        target.on_change(sorted(written & live.keys()), ahead)


def _copy(staged: Staged, places: Local) -> set[str]:
    """Write what does not take the place of a tensor; returns the names of tensors that were written."""
    written = set()
    for bucket, data in staged.whole:
        _spread(bucket, data, places)
        written.update(part.name for part in bucket.slices)
    for name, positions, values in staged.delta:
        # Not scatter_: for bfloat16 on a CPU it takes time for every element of the tensor.
        flat = places[name].view(-1)
        flat.index_copy_(0, positions.to(flat.device), values.to(flat.device))
        written.add(name)
    return written


def _spread(bucket: Bucket, data: torch.Tensor, places: Local) -> None:
    """Write those parts of a message that belong to one of `places`."""
    for part in bucket.slices:
        if part.name in places:
            came = data[part.at : part.at + part.elements].view(part.window.size)
            part.window.of(places[part.name]).copy_(came)


def located(
    peer: str, bucket: Bucket, counts: Sequence[int], positions: torch.Tensor, values: torch.Tensor
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Where the entries of one message belong, worked out before the engine has to wait for it.

    Raises TransferError for positions outside their slice, or one that is there twice.
    """
    found = []
    split = zip(bucket.slices, positions.split(list(counts)), values.split(list(counts)), strict=True)
    for part, at, new in split:
        if not len(at):
            continue
        if at[0] < 0 or at[-1] >= part.elements or not bool((at[1:] > at[:-1]).all()):
            raise TransferError(
                f"{peer} sent positions of {part.name} that do not rise from 0 to {part.elements - 1}"
            )
        found.append((part.name, part.flat(at), new))
    return found
