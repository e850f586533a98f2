"""Where a worker keeps an update until it is taken: in the host's memory, beside the live weights.

Where a target lets its tensors' memory be exchanged, what arrives is written to a shadow of the tensor, which then
takes its place, and whose old memory is the shadow in the next update: of a whole tensor as it arrives, of a delta to
a copy when all of it is there. Everything else is kept as it came, and written in the commit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from titan_bridge.sharding.moves import Window
from titan_bridge.sharding.show import human
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.messages import Bucket
from titan_bridge.transfer.snapshot import Local
from titan_bridge.transfer.target import Target, signature, unshared
from titan_bridge.transfer.transports import Tcp
from titan_bridge.transfer.wire import Deadline

Messages = Mapping[int, Sequence[Bucket]]  # what a worker gets from each trainer rank
Entry = tuple[str, Window | torch.Tensor, torch.Tensor]
"""Name, where in the flat local tensor (a window, or int64 positions), and the values there."""


class Staging:
    """The memory for the messages of one worker; kept for the next update."""

    def __init__(self, messages: Messages, target: Target, live: Local) -> None:
        self.messages, self._target = messages, target
        self.device = next((tensor.device for tensor in live.values()), torch.device("cpu"))
        self.expected = {name: signature(tensor) for name, tensor in live.items()}  # as planned for
        self.whole: frozenset[int] = frozenset()  # trainer ranks that send all of the update under way
        self._senders: dict[str, set[int]] = {}
        arriving: Counter[str] = Counter()
        for rank, buckets in messages.items():
            for part in (part for bucket in buckets for part in bucket.slices):
                self._senders.setdefault(part.name, set()).add(rank)
                arriving[part.name] += part.elements
        self._shadowable: Local = {}
        if target.swap and self.device.type == "cpu":
            alone = unshared(live).items()
            self._shadowable = {name: t.to("meta") for name, t in alone if 0 < arriving[name] == t.numel()}
        self._held: dict[Any, torch.Tensor] = {}
        """Shadows by name, whole messages by bucket, and by trainer rank what messages pass through on their way."""
        self._use: dict[str, torch.Tensor] = {}  # shadows that the update under way fills

    @property
    def nbytes(self) -> int:
        """Memory that is held now."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def prepare(self, whole: Iterable[int]) -> None:
        """Make room for what trainer ranks `whole` send all of. Raises TransferError where there is no memory."""
        self._use, self.whole = {}, frozenset(whole)
        names = [name for name in self._shadowable if self._senders[name] <= self.whole]
        self._use = {name: self._room(name, self._shadowable[name]) for name in names}
        for rank in self.whole:
            passing = 0
            for bucket in self.messages[rank]:
                if not self._all_shadowed(bucket):
                    self._room(bucket, torch.empty(bucket.elements, dtype=bucket.dtype, device="meta"))
                elif bucket.run is None:
                    passing = max(passing, bucket.nbytes)
            if passing:
                self._room(rank, torch.empty(passing, dtype=torch.uint8, device="meta"))

    def _room(self, key: Any, meta: torch.Tensor) -> torch.Tensor:
        """What is held as `key`, as large as `meta` at least."""
        if key not in self._held or self._held[key].nbytes < meta.nbytes:
            try:
                if self.device.type == "cuda":
                    self._held[key] = torch.empty_like(meta, device="cpu", pin_memory=True)
                else:
                    self._held[key] = self._target.memory(meta, device=torch.device("cpu"))
            except (RuntimeError, MemoryError, OSError) as error:
                self._held, self._use = {}, {}
                size = human(sum(bucket.nbytes for buckets in self.messages.values() for bucket in buckets))
                raise TransferError(f"no memory on the host for {size} of new weights: {error}") from None
        return self._held[key]

    def _all_shadowed(self, bucket: Bucket) -> bool:
        return all(part.name in self._use for part in bucket.slices)

    def receive(self, rank: int, way: Tcp, number: int, deadline: Deadline) -> tuple[list[Entry], int]:
        """All that trainer rank `rank` sends of update `number`: what is not in shadows now, and the bytes that came.

        Raises TransferError; nothing live was touched.
        """
        head, whole = way.head(deadline), rank in self.whole
        if head != {"number": number, "kind": "whole" if whole else "delta"}:
            raise TransferError(f"{way.connection.peer} announced {head} in update {number}")
        return (self._whole if whole else self._delta)(rank, way, deadline)

    def _whole(self, rank: int, way: Tcp, deadline: Deadline) -> tuple[list[Entry], int]:
        entries: list[Entry] = []
        for bucket in self.messages[rank]:
            shadowed = self._all_shadowed(bucket)
            if shadowed and bucket.run is not None:
                way.receive(self._use[bucket.slices[0].name].view(-1)[bucket.run], deadline)
                continue
            data = self._held[rank][: bucket.nbytes].view(bucket.dtype) if shadowed else self._held[bucket]
            way.receive(data, deadline)
            for part in bucket.slices:
                values = data[part.at : part.at + part.elements]
                if part.name in self._use:
                    _put(self._use[part.name], part.window, values)
                else:
                    entries.append((part.name, part.window, values))
        return entries, sum(bucket.nbytes for bucket in self.messages[rank])

    def _delta(self, rank: int, way: Tcp, deadline: Deadline) -> tuple[list[Entry], int]:
        buckets, peer = self.messages[rank], way.connection.peer
        counts = torch.empty(sum(len(bucket.slices) for bucket in buckets), dtype=torch.int32)
        way.receive(counts, deadline)
        entries, nbytes, left = list[Entry](), counts.nbytes, iter(counts.tolist())
        for bucket in buckets:
            mine = [next(left) for _ in bucket.slices]
            for count, part in zip(mine, bucket.slices, strict=True):  # before any memory is asked for
                if not 0 <= count <= part.elements:
                    raise TransferError(f"{peer} announced {count} of {part.elements} elements: {part.name}")
            if total := sum(mine):
                positions = torch.empty(total, dtype=torch.int32)
                values = torch.empty(total, dtype=bucket.dtype)
                way.receive(positions, deadline)
                way.receive(values, deadline)
                entries += located(peer, bucket, mine, positions, values)
                nbytes += positions.nbytes + values.nbytes
        return entries, nbytes

    def ahead(self, entries: Sequence[Entry]) -> Any:
        """Do what a commit need not wait for, when all has arrived; returns what the target makes of it."""
        live = self._target.tensors()
        for name in {name for name, *_ in entries} & self._shadowable.keys():
            self._use[name] = self._room(name, self._shadowable[name]).copy_(live[name])
        for name, where, values in entries:
            if name in self._use:
                _put(self._use[name], where, values)
        return self._target.ahead(self._use)

    def write(self, entries: Sequence[Entry], ahead: Any = None) -> None:
        """Make an update live, and tell the target what was written.

        Raises whatever a loader of the target's raises; the weights are then neither the old ones nor the new.
        """
        target, live = self._target, self._target.tensors()
        loaded = {  # on the host, where loaders find what they read from files, too
            name: torch.empty(target.layout.params[name].shape, dtype=dtype)
            for name, dtype in target.whole.items()
        }
        places, written = {**live, **loaded}, set(self._use)
        for name, where, values in entries:
            if name not in self._use:
                _put(places[name], where, values)
                written.add(name)
        if loaded:
            target.load(loaded)
        if self._use:
            assert target.swap is not None
            self._held |= target.swap(self._use)
        self._use = {}
        target.on_change(sorted(written & live.keys()), ahead)


def _put(tensor: torch.Tensor, where: Window | torch.Tensor, values: torch.Tensor) -> None:
    if isinstance(where, Window):
        where.of(tensor).copy_(values.view(where.size))
    else:
        # Not scatter_: for bfloat16 on a CPU it takes time for every element of the tensor.
        tensor.view(-1).index_copy_(0, where.to(tensor.device), values.to(tensor.device))


def located(
    peer: str, bucket: Bucket, counts: Sequence[int], positions: torch.Tensor, values: torch.Tensor
) -> list[Entry]:
    """Where the entries of one message belong, worked out before the engine has to wait for it.

    Raises TransferError for positions outside their slice, or one that is there twice.
    """
    found: list[Entry] = []
    split = zip(bucket.slices, positions.split(list(counts)), values.split(list(counts)), strict=True)
    for part, at, new in split:
        if not len(at):
            continue
        if at[0] < 0 or at[-1] >= part.elements or not bool((at[1:] > at[:-1]).all()):
            raise TransferError(f"{peer}: positions in {part.name} do not rise from 0 to {part.elements - 1}")
        found.append((part.name, part.flat(at), new))
    return found
