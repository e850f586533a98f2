"""Which replica sends: equal loads, the same way every time.

Copies of one size that any replica of a shard can send are dealt out together, by filling the least loaded replicas up
to a common level, as water does; large ones first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from titan_bridge.sharding.match import Item
from titan_bridge.sharding.moves import Group
from titan_bridge.sharding.sides import Geometry
from titan_bridge.sharding.tensors import Owner, TensorMetadata


def fill(loads: np.ndarray, items: np.ndarray, size: np.ndarray) -> np.ndarray:
    """How many of `items[c]` copies of `size[c]` bytes each bin of row c takes, so that the fullest stays lowest.

    Args:
        loads: [rows, bins] bytes in each bin already; a very large number closes a bin.
        items, size: [rows] copies to deal out, and bytes of each, at least 1.

    Returns [rows, bins] copies. Equal to dealing one copy at a time to the least loaded bin, up to ties.
    """
    bins = loads.shape[1]
    ordered = np.sort(loads, axis=1)
    filled = np.arange(1, bins + 1)
    # Level of the water if the k least loaded bins share it; the right k is the largest whose own floor is
    # under it. In floats, because closed bins would overflow; only the choice of k depends on it.
    level = (items[:, None] * size[:, None] + np.cumsum(ordered.astype(np.float64), axis=1)) / filled
    k = np.maximum((level > ordered).sum(axis=1), 1)
    total = np.cumsum(np.where(filled <= k[:, None], ordered, 0), axis=1)[:, -1]
    water = (items * size + total) // k
    count = np.maximum((water[:, None] - loads) // size[:, None], 0)
    # What is left over is less than one copy for each filled bin: to those that are then least loaded.
    left = items - count.sum(axis=1)
    rank = np.argsort(np.argsort(loads + count * size[:, None], axis=1, kind="stable"), axis=1, kind="stable")
    count += rank < left[:, None]
    assert (count.sum(axis=1) == items).all(), "copies lost while balancing"
    return count


def deal(
    loads: np.ndarray, senders: np.ndarray, shard: np.ndarray, size: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """Choose a replica for every copy and add the bytes to `loads`.

    Args:
        loads: [owners] bytes that each owner sends so far; changed in place.
        senders: [shards, replicas] owners of each source shard, -1 where there are fewer.
        shard, size: [pairs] the source shard of each pair of shards, and bytes of one copy.
        wanted: [pairs, copies] False where nothing has to be sent (no such destination, or it has the data).

    Returns int16 [pairs, copies]: which replica sends (0 where nothing is wanted).
    """
    choice = np.zeros(wanted.shape, dtype=np.int16)
    if not len(shard) or not wanted.shape[1]:
        return choice
    order = np.lexsort((-size, shard))
    ordered_shard, ordered_size = shard[order], size[order]
    new_shard = np.r_[True, ordered_shard[1:] != ordered_shard[:-1]]
    new_run = new_shard | np.r_[True, ordered_size[1:] != ordered_size[:-1]]
    run = np.cumsum(new_run) - 1
    run_first = np.flatnonzero(new_run)
    run_shard, run_size = ordered_shard[run_first], ordered_size[run_first]
    # The n-th run of every shard is dealt out in round n.
    first_of_shard = np.maximum.accumulate(np.where(new_shard[run_first], np.arange(len(run_first)), 0))
    turn = np.arange(len(run_first)) - first_of_shard
    items = np.zeros(len(run_first), dtype=np.int64)
    np.add.at(items, run, wanted[order].sum(axis=1))
    closed = np.int64(1) << 62
    for n in range(int(turn.max()) + 1):
        runs = np.flatnonzero((turn == n) & (items > 0) & (run_size > 0))
        if not len(runs):
            continue
        who = senders[run_shard[runs]]
        open_ = who >= 0
        count = fill(np.where(open_, loads[who], closed), items[runs], run_size[runs])
        np.add.at(loads, who[open_], (count * run_size[runs, None])[open_])
        sequence = np.repeat(np.tile(np.arange(who.shape[1], dtype=np.int16), len(runs)), count.ravel())
        mine = np.zeros(len(run_first), dtype=bool)
        mine[runs] = True
        pairs = order[mine[run]]
        part = choice[pairs]
        part[wanted[pairs]] = sequence
        choice[pairs] = part
    return choice


class Ledger:
    """Numbers for owners, and what each sends and receives."""

    def __init__(self, tensors: Iterable[TensorMetadata]) -> None:
        self.index: dict[Owner, int] = {}
        self._numbers: dict[tuple[Owner, ...], np.ndarray] = {}
        self.lacking: Counter[tuple[int, ...]] = Counter()
        """Bytes that one of several owners has to send, by their numbers."""
        for owners in dict.fromkeys(tensor.owners for tensor in tensors):
            numbers = [self.index.setdefault(owner, len(self.index)) for owner in owners]
            self._numbers[owners] = np.asarray(numbers, dtype=np.int32)
        self.sent, self.received = np.zeros((2, len(self.index)), dtype=np.int64)

    def numbers(self, tensor: TensorMetadata) -> np.ndarray:
        """The numbers of a tensor's owners, by slot; equal owners give the same array object."""
        return self._numbers[tensor.owners]

    def floor(self) -> int:
        """See `Plan.load_floor`."""
        return max((-(-amount // len(who)) for who, amount in self.lacking.items()), default=0)

    def of(self, side: Mapping[str, TensorMetadata]) -> list[int]:
        """The numbers of all owners of a side, sorted."""
        owners = {owner for owners in {tensor.owners for tensor in side.values()} for owner in owners}
        return sorted(self.index[owner] for owner in owners)


def choose(geometry: Geometry, width: int, items: list[Item], ledger: Ledger, colocated: bool) -> Group:
    """Decide who sends what of tensors that look alike, and write it in the ledger."""
    sources = np.stack([ledger.numbers(item.source) for item in items])
    destinations = np.stack([ledger.numbers(item.destination) for item in items])
    pair_slots = geometry.destination.slots[geometry.pair_destination]
    size = geometry.pair_elements * width
    shape = (*pair_slots.shape, len(items))
    local = np.zeros(shape, dtype=bool) if colocated else np.broadcast_to(False, shape)
    if geometry.source.slots.shape[1] <= 1 and not colocated:
        # Nothing to choose: look at all tensors at once, also where each lies in another file.
        choice = np.broadcast_to(np.int16(0), shape)
        copies = (pair_slots >= 0).sum(axis=1)
        if len(size):
            slot = geometry.source.slots[geometry.pair_source, 0]
            _add(ledger.sent, sources[:, slot], size * copies)
            pair, replica = np.nonzero(pair_slots >= 0)
            _add(ledger.received, destinations[:, pair_slots[pair, replica]], size[pair])
        for item in items:
            ledger.lacking[tuple(np.unique(ledger.numbers(item.source)))] += int((size * copies).sum())
        return Group(geometry, tuple(items), width, sources, destinations, choice, local)
    choice = np.zeros(shape, dtype=np.int16)
    same: dict[tuple[int, int], list[int]] = {}
    for tensor, item in enumerate(items):
        key = (id(ledger.numbers(item.source)), id(ledger.numbers(item.destination)))
        same.setdefault(key, []).append(tensor)
    for tensors in same.values():
        first, n = tensors[0], len(tensors)
        senders = _at(sources[first], geometry.source.slots)
        receivers = _at(destinations[first], geometry.destination.slots)[geometry.pair_destination]
        wanted = receivers >= 0
        own = np.full(receivers.shape, -1)
        if colocated:
            own = _own(senders, geometry.pair_source, receivers)
            wanted &= own < 0
            local[:, :, tensors] = (own >= 0)[:, :, None]
        each = np.repeat(wanted, n, axis=1)  # the tensors of one destination side by side
        chosen = deal(ledger.sent, senders, geometry.pair_source, size, each).reshape(*wanted.shape, n)
        if colocated:
            chosen = np.where((own >= 0)[:, :, None], own[:, :, None], chosen)
        choice[:, :, tensors] = chosen
        pair, replica = np.nonzero(wanted)
        _add(ledger.received, receivers[pair, replica], size[pair] * n)
        there = (_at(destinations[first], geometry.destination.slots) >= 0).sum(axis=1)
        lacking = int(((geometry.need - geometry.missing) * there).sum()) * width
        lacking -= int((size * (own >= 0).sum(axis=1)).sum())
        ledger.lacking[tuple(np.unique(sources[first]))] += lacking * n
    return Group(geometry, tuple(items), width, sources, destinations, choice, local)


def _add(total: np.ndarray, at: np.ndarray, amount: np.ndarray) -> None:
    """`total[at] += amount`, repeated indices included."""
    # numpy 2.3's `add.at` reads beyond an operand that it would have to broadcast: give it equal 1-d arrays.
    np.add.at(total, at.ravel(), np.broadcast_to(amount, at.shape).ravel())


def _at(numbers: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Owners in slots; -1 stays -1."""
    return np.where(slots < 0, -1, numbers[slots])


def _own(senders: np.ndarray, shard: np.ndarray, receivers: np.ndarray) -> np.ndarray:
    """[pairs, replicas]: which replica of the pair's source shard the receiver itself is, or -1."""
    numbers = int(max(senders.max(initial=0), receivers.max(initial=0))) + 1
    at, replica = np.nonzero(senders >= 0)
    if not len(at):
        return np.full(receivers.shape, -1)
    known = at * numbers + senders[at, replica]
    order = np.argsort(known, kind="stable")
    asked = np.where(receivers < 0, -1, shard[:, None] * numbers + receivers)
    found = np.minimum(np.searchsorted(known[order], asked), len(known) - 1)
    return np.where(known[order][found] == asked, replica[order][found], -1)
