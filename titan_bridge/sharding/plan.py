"""The planner: from one layout to another, exactly.

The invariants, which `plan` checks before it returns:

- every element of every destination is written exactly once;
- the bytes that travel are the lower bound: what each destination lacks. With `colocated`, what a rank
  already holds is copied on the spot;
- among replicas the sender is chosen so that the loads are equal (see `balance`), the same way every time.

It is arithmetic on shapes. Tensors that look alike (the layers of a model) are planned once, and replicas are
never looked at one by one, so a model of 1 T parameters takes about a second. A plan stays compact:
`copies()` writes out the copies of one rank, or of all, when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.balance import deal
from titan_bridge.sharding.holders import Held, Holder, MeshHolders, held_in
from titan_bridge.sharding.layout import Layout, itemsize
from titan_bridge.sharding.match import Item, match
from titan_bridge.sharding.moves import Copy, Group, copies_of, ends
from titan_bridge.sharding.overlap import Geometry
from titan_bridge.sharding.sides import external_frame, identity_frame, side_of, titan_frame
from titan_bridge.sharding.spec import placement_to_str
from titan_bridge.sharding.view import View

_BLOCK = 4_000_000
"""Copies looked at together in sums over a whole plan: bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What has to be copied from where to where. Bytes are those on the wire (the destination's dtype, by
    default)."""

    groups: tuple[Group, ...]
    holders: tuple[Holder, ...]
    """All ranks and files of both sides."""
    sent: Mapping[Holder, int]
    """Bytes that each source sends, zero included; what stays where it is does not count."""
    received: Mapping[Holder, int]
    """Bytes that each destination receives."""
    load_floor: int
    """Bytes that the most loaded sender has at least, whoever is chosen: what only the ranks of one mesh
    (a pipeline stage) can send, divided by how many they are."""
    lower_bound: int
    """Bytes that the destinations lack, computed from the two layouts alone."""
    unused: tuple[str, ...]
    """Source tensors that no destination asks for."""
    missing: Mapping[str, int]
    """Elements of destination tensors that no source has (only with `allow_missing`)."""

    @property
    def bytes(self) -> int:
        """Bytes that travel."""
        return sum(self.sent.values())

    @property
    def balance(self) -> float:
        """Most loaded sender over the mean of all senders; 1.0 when nothing is sent."""
        loads = list(self.sent.values())
        return max(loads) * len(loads) / total if (total := sum(loads)) else 1.0

    @property
    def balance_floor(self) -> float:
        """The least `balance` that any choice among replicas could have (as far as `load_floor` tells)."""
        return self.load_floor * len(self.sent) / total if (total := self.bytes) else 1.0

    @cached_property
    def copies_count(self) -> int:
        """How many copies `copies()` yields."""
        total = 0
        for group in self.groups:
            rows = np.diff(group.geometry.pair_first)
            slots = (group.geometry.destination_slots >= 0).sum(axis=1)
            total += int((rows * slots[group.geometry.pair_destination]).sum()) * len(group.items)
        return total

    def _blocks(self) -> Iterator[tuple[Group, slice]]:
        for group in self.groups:
            step = max(1, _BLOCK // max(1, group.choice.shape[0] * group.choice.shape[1]))
            for first in range(0, len(group.items), step):
                yield group, slice(first, first + step)

    def traffic(self) -> np.ndarray:
        """int64 [holders, holders]: bytes from row to column, in the order of `holders`; local copies left
        out."""
        n = len(self.holders)
        result = np.zeros(n * n, dtype=np.int64)
        for group, tensors in self._blocks():
            source, destination = ends(group, tensors)
            travels = (destination >= 0) & ~group.local[:, :, tensors]
            size = (group.geometry.pair_elements * group.itemsize)[:, None, None]
            size = np.broadcast_to(size, travels.shape)
            np.add.at(result, (source * n + destination)[travels], size[travels])
        return result.reshape(n, n)

    def by_tensor(self) -> dict[str, int]:
        """Bytes that travel for each destination tensor."""
        result: dict[str, int] = {}
        for group, tensors in self._blocks():
            geometry = group.geometry
            there = (geometry.destination_slots >= 0)[geometry.pair_destination][:, :, None]
            count = (there & ~group.local[:, :, tensors]).sum(axis=1)
            sums = (geometry.pair_elements * group.itemsize) @ count
            for item, total in zip(group.items[tensors], sums.tolist(), strict=True):
                result[item.destination.name] = result.get(item.destination.name, 0) + total
        return result

    def copies(self, *, source: Holder | None = None, destination: Holder | None = None) -> Iterator[Copy]:
        """All copies, or those from one holder, or to one, or both; in the same order every time."""
        index = {holder: i for i, holder in enumerate(self.holders)}
        if {source, destination} - {None} <= index.keys():
            for group in self.groups:
                yield from copies_of(group, self.holders, index.get(source), index.get(destination))


def plan(
    source: Layout | Iterable[Held],
    destination: Layout | Iterable[Held],
    views: Sequence[View] = (),
    *,
    colocated: bool = False,
    allow_missing: bool = False,
    wire: Literal["source", "destination"] = "destination",
) -> Plan:
    """Plan the copies that fill every tensor of `destination` from `source`.

    Args:
        source: A layout, or tensors with their holders (ranks of a mesh, files, chunks).
        destination: The same. It decides: what it does not name is not copied (see `Plan.unused`).
        views: For tensors with different names or shapes on the two sides, in either direction.
        colocated: Rank r of the source and rank r of the destination are one process, so what it holds
            already does not travel. Otherwise the two sides are different machines, whatever their ranks
            are called.
        allow_missing: Accept destination elements that no source has (padding); `Plan.missing` counts them.
        wire: "destination" or "source": whose dtype the bytes are counted in.

    Raises BridgeError when a tensor is missing, has another shape, or is not covered.
    """
    sources, destinations = held_in(source), held_in(destination)
    items, unused, missing = match(sources, destinations, views, allow_missing=allow_missing)
    ledger = _Ledger()
    batches: dict[tuple, list[Item]] = {}
    for item in items:
        width = itemsize((item.destination if wire == "destination" else item.source).dtype)
        batches.setdefault((width, *_alike(item)), []).append(item)
    geometries: dict[tuple, Geometry] = {}
    work = []
    for (width, *key), batch in batches.items():
        if tuple(key) not in geometries:
            geometries[tuple(key)] = _geometry(batch[0])
        geometry = geometries[tuple(key)]
        _check_missing(geometry, batch, missing, allow_missing)
        work.append((geometry, width, batch))
    for held in [*sources.values(), *destinations.values()]:
        ledger.numbers(held)
    # Tensors that only one holder can send come first: replicas then make up for what those weigh.
    work.sort(key=lambda w: (w[0].source_slots.shape[1], -w[0].pair_elements.max(initial=0) * w[1]))
    ledger.open()
    groups = tuple(_choose(geometry, width, batch, ledger, colocated) for geometry, width, batch in work)
    holders = tuple(ledger.index)
    result = Plan(
        groups=groups,
        holders=holders,
        sent={holders[i]: int(ledger.sent[i]) for i in ledger.of(sources)},
        received={holders[i]: int(ledger.received[i]) for i in ledger.of(destinations)},
        load_floor=ledger.floor(),
        lower_bound=sum(ledger.lacking.values()),
        unused=unused,
        missing=missing,
    )
    assert result.bytes == result.lower_bound == sum(result.received.values()), "more travels than is lacking"
    return result


class _Ledger:
    """Numbers for holders, and what each sends and receives."""

    def __init__(self) -> None:
        self.index: dict[Holder, int] = {}
        self._known: dict[tuple[Holder, ...], np.ndarray] = {}

    def numbers(self, held: Held) -> np.ndarray:
        """The numbers of a tensor's holders, by slot; equal holders give the same array object."""
        by = held.by
        names = by.mesh.ranks if isinstance(by, MeshHolders) else tuple(holder for holder, _ in by.chunks)
        if names not in self._known:
            numbers = [self.index.setdefault(name, len(self.index)) for name in names]
            self._known[names] = np.asarray(numbers, dtype=np.int32)
        return self._known[names]

    def open(self) -> None:
        """Start to count, now that all holders have numbers."""
        self.sent, self.received = np.zeros((2, len(self.index)), dtype=np.int64)
        self.lacking: dict[tuple[int, ...], int] = {}

    def lack(self, senders: np.ndarray, amount: int) -> None:
        """Count bytes that one of `senders` (numbers, by slot) has to send."""
        key = tuple(sorted(set(senders.tolist())))
        self.lacking[key] = self.lacking.get(key, 0) + amount

    def floor(self) -> int:
        """See `Plan.load_floor`."""
        return max((-(-amount // len(who)) for who, amount in self.lacking.items()), default=0)

    def of(self, side: Mapping[str, Held]) -> list[int]:
        """The numbers of all holders of a side, sorted."""
        arrays = {id(a): a for a in map(self.numbers, side.values())}
        return sorted({int(n) for a in arrays.values() for n in a})


def _alike(item: Item) -> tuple:
    """Equal for items with the same geometry."""
    view = item.view
    return (
        _side_key(item.source),
        _side_key(item.destination),
        view and (item.external_source, view.shape, view.factors, view.index, view.permute),
    )


def _side_key(held: Held) -> tuple:
    if isinstance(held.by, MeshHolders):
        return held.shape, held.by.mesh.shape, tuple(map(placement_to_str, held.by.placements))
    return held.shape, tuple(box for _, box in held.by.chunks)


def _geometry(item: Item) -> Geometry:
    view = item.view
    if view is None:
        frames = [identity_frame(item.source.shape)] * 2
        sizes = item.source.shape
    else:
        frames = [external_frame(view), titan_frame(view)]
        frames = frames if item.external_source else frames[::-1]
        sizes = view.index_shape
    source = side_of(item.source, frames[0], source=True)
    return Geometry(source, side_of(item.destination, frames[1], source=False), sizes)


def _check_missing(geometry: Geometry, items: list[Item], missing: dict[str, int], allowed: bool) -> None:
    """Only chunks can leave holes: placements always cover."""
    holes = int(geometry.missing.sum())
    if not holes:
        return
    name = items[0].destination.name
    if not allowed:
        raise BridgeError(f"{name}: {holes} elements of {items[0].source.name} are in no source chunk")
    for item in items:
        name = item.destination.name
        missing[name] = missing.get(name, 0) + holes


def _choose(geometry: Geometry, width: int, items: list[Item], ledger: _Ledger, colocated: bool) -> Group:
    """Decide who sends what of tensors that look alike, and write it in the ledger."""
    sources = np.stack([ledger.numbers(item.source) for item in items])
    destinations = np.stack([ledger.numbers(item.destination) for item in items])
    pair_slots = geometry.destination_slots[geometry.pair_destination]
    size = geometry.pair_elements * width
    shape = (*pair_slots.shape, len(items))
    if geometry.source_slots.shape[1] <= 1 and not colocated:
        # Nothing to choose: look at all tensors at once, also where each lies in another file.
        choice, local = np.broadcast_to(np.int16(0), shape), np.broadcast_to(False, shape)
        copies = (pair_slots >= 0).sum(axis=1)
        if len(size):
            slot = geometry.source_slots[geometry.pair_source, 0]
            _add(ledger.sent, sources[:, slot], size * copies)
            pair, replica = np.nonzero(pair_slots >= 0)
            _add(ledger.received, destinations[:, pair_slots[pair, replica]], size[pair])
        for item in items:
            ledger.lack(ledger.numbers(item.source), int((size * copies).sum()))
        return Group(geometry, tuple(items), width, sources, destinations, choice, local)
    choice = np.zeros(shape, dtype=np.int16)
    local = np.zeros(shape, dtype=bool) if colocated else np.broadcast_to(False, shape)
    same: dict[tuple[int, int], list[int]] = {}
    for tensor, item in enumerate(items):
        key = (id(ledger.numbers(item.source)), id(ledger.numbers(item.destination)))
        same.setdefault(key, []).append(tensor)
    for tensors in same.values():
        first, n = tensors[0], len(tensors)
        senders = _at(sources[first], geometry.source_slots)
        receivers = _at(destinations[first], geometry.destination_slots)[geometry.pair_destination]
        wanted = receivers >= 0
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
        there = (_at(destinations[first], geometry.destination_slots) >= 0).sum(axis=1)
        lacking = int(((geometry.need - geometry.missing) * there).sum()) * width
        if colocated:
            lacking -= int((size * (own >= 0).sum(axis=1)).sum())
        ledger.lack(sources[first], lacking * n)
    return Group(geometry, tuple(items), width, sources, destinations, choice, local)


def _add(total: np.ndarray, at: np.ndarray, amount: np.ndarray) -> None:
    """`total[at] += amount`, repeated indices included."""
    # numpy 2.3's `add.at` reads beyond an operand that it would have to broadcast: give it equal 1-d arrays.
    np.add.at(total, at.ravel(), np.broadcast_to(amount, at.shape).ravel())


def _at(numbers: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Holders in slots; -1 stays -1."""
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
