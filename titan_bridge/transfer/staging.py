"""Where a worker keeps an update until it is taken: in the host's memory, beside the live weights.

Whole messages lie in buckets, or, where a target lets its tensors' memory be exchanged, in a shadow of the tensor that
then takes its place, and whose old memory is the staging of the next update. A delta is kept as it came.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

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
        self._shadowable = (
            _shadowable(messages, unshared(live)) if target.swap and device.type == "cpu" else {}
        )
        self._senders: dict[str, set[int]] = {}
        for rank, buckets in messages.items():
            for bucket in buckets:
                for part in bucket.slices:
                    self._senders.setdefault(part.name, set()).add(rank)
        self._buckets: dict[tuple[int, int], torch.Tensor] = {}
        self._shadows: dict[str, torch.Tensor] = {}
        self._use: frozenset[str] = frozenset()
        """Shadows that the update under way fills."""

    @property
    def nbytes(self) -> int:
        """Memory that is held now."""
        return sum(part.nbytes for part in (*self._buckets.values(), *self._shadows.values()))

    def prepare(self, whole: Collection[int]) -> None:
        """Make room for what trainer ranks `whole` send all of. Raises TransferError where there is no memory."""
        self._use = frozenset(name for name in self._shadowable if self._senders[name] <= set(whole))
        make, host = self._target.memory, torch.device("cpu")
        try:
            for name in self._use - self._shadows.keys():
                self._shadows[name] = make(self._shadowable[name], device=host)
            for rank in set(whole) & self._messages.keys():
                for at, bucket in enumerate(self._messages[rank]):
                    if bucket.slices[0].name in self._use or (rank, at) in self._buckets:
                        continue
                    like = torch.empty(bucket.elements, dtype=bucket.dtype, device="meta")
                    self._buckets[rank, at] = (
                        torch.empty_like(like, device=host, pin_memory=True)
                        if self._pin
                        else make(like, device=host)
                    )
        except (RuntimeError, MemoryError, OSError) as error:
            self._buckets, self._shadows = {}, {}
            size = human(sum(bucket.nbytes for buckets in self._messages.values() for bucket in buckets))
            raise TransferError(
                f"no memory on the host for {size} of new weights beside the live ones: {error}"
            ) from None

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
        for at, bucket in enumerate(self._messages[rank]):
            name = bucket.slices[0].name
            if name in self._use:
                assert bucket.run is not None
                place = self._shadows[name].view(-1)[bucket.run]
            else:
                staged.whole.append((bucket, place := self._buckets[rank, at]))
            way.receive(place, deadline)
            staged.nbytes += bucket.nbytes

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

    def write(self, staged: Sequence[Staged]) -> None:
        """Make an update live, and tell the target what was written.

        Raises whatever a loader of the target's raises; the weights are then neither the old ones nor the new.
        """
        target, live = self._target, self._target.tensors()
        params = target.layout.params
        loaded = {
            name: torch.empty(params[name].shape, dtype=dtype, device=self.device)
            for name, dtype in target.whole.items()
        }
        written = set(self._use)
        for each in staged:
            written |= _copy(each, {**live, **loaded})
        if loaded:
            target.load(loaded)
        for name in self._use:
            assert target.swap is not None
            self._shadows[name] = target.swap(name, self._shadows[name])
        self._use = frozenset()
        target.on_change(sorted(written & live.keys()))


def _copy(staged: Staged, places: Local) -> set[str]:
    """Write what does not take the place of a tensor; returns the names of tensors that were written."""
    written = set()
    for bucket, data in staged.whole:
        for part in bucket.slices:
            part.of(places[part.name]).copy_(data[part.at : part.at + part.elements].view(part.window.size))
            written.add(part.name)
    for name, positions, values in staged.delta:
        # Not scatter_: for bfloat16 on a CPU it takes time for every element of the tensor.
        flat = places[name].view(-1)
        flat.index_copy_(0, positions.to(flat.device), values.to(flat.device))
        written.add(name)
    return written


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


def _shadowable(messages: Messages, whole: Local) -> dict[str, torch.Tensor]:
    """Those of `whole`, as meta tensors, of which every element comes in a message that is laid out like them."""
    metas = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in whole.items()}
    arriving = dict.fromkeys(metas, 0)
    for bucket in (bucket for buckets in messages.values() for bucket in buckets):
        for part in bucket.slices:
            meta = metas.get(part.name)
            if meta is None:
                continue
            if bucket.run is None or bucket.dtype != meta.dtype:
                del metas[part.name]
            else:
                arriving[part.name] += part.elements
    return {name: meta for name, meta in metas.items() if arriving[name] == meta.numel()}
