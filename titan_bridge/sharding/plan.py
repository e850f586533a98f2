"""The planner: from one layout to another, exactly.

The invariants, which `plan` checks before it returns:

- every element of every destination is written exactly once;
- the bytes that travel are the lower bound: what each destination lacks. With `colocated`, what a rank
  already holds is copied on the spot;
- among replicas the sender is chosen so that the loads are equal (see `balance`), the same way every time.

Tensors that look alike (the layers of a model) are planned once, and replicas are never looked at one by one, so a
model of 1 T parameters takes about a second. A plan stays compact: `copies()` writes copies out when asked to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.balance import Ledger, choose
from titan_bridge.sharding.layout import Layout
from titan_bridge.sharding.match import Item, match
from titan_bridge.sharding.moves import Copy, Group, copies_of, ends
from titan_bridge.sharding.sides import Geometry, external_frame, identity_frame, side_of, titan_frame
from titan_bridge.sharding.tensors import Owner, TensorMetadata, by_name
from titan_bridge.sharding.view import View

_BLOCK = 4_000_000  # copies looked at together in sums over a whole plan: bounds the memory


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What has to be copied from where to where. Bytes are those of the destination's dtype."""

    groups: tuple[Group, ...]
    owners: tuple[Owner, ...]  # all ranks and files of both sides
    sent: Mapping[Owner, int]
    """Bytes that each source sends, zero included; what stays where it is does not count."""
    received: Mapping[Owner, int]  # bytes that each destination receives
    load_floor: int
    """Bytes that the most loaded sender has at least, whoever is chosen: what only the ranks of one mesh
    (a pipeline stage) can send, divided by how many they are."""
    lower_bound: int  # bytes that the destinations lack, computed from the two layouts alone
    unused: tuple[str, ...]  # source tensors that no destination asks for
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
            slots = (group.geometry.destination.slots >= 0).sum(axis=1)[group.geometry.pair_destination]
            total += int((np.diff(group.geometry.pair_first) * slots).sum()) * len(group.items)
        return total

    def _blocks(self) -> Iterator[tuple[Group, slice]]:
        for group in self.groups:
            step = max(1, _BLOCK // max(1, group.choice.shape[0] * group.choice.shape[1]))
            for first in range(0, len(group.items), step):
                yield group, slice(first, first + step)

    def traffic(self) -> np.ndarray:
        """int64 [owners, owners]: bytes from row to column, in the order of `owners`; local copies left out."""
        n = len(self.owners)
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
        result: Counter[str] = Counter()
        for group, tensors in self._blocks():
            geometry = group.geometry
            there = (geometry.destination.slots >= 0)[geometry.pair_destination][:, :, None]
            count = (there & ~group.local[:, :, tensors]).sum(axis=1)
            sums = (geometry.pair_elements * group.itemsize) @ count
            for item, total in zip(group.items[tensors], sums.tolist(), strict=True):
                result[item.destination.name] += total
        return dict(result)

    def copies(self, *, source: Owner | None = None, destination: Owner | None = None) -> Iterator[Copy]:
        """All copies, or those from one owner, or to one, or both; in the same order every time."""
        index = {owner: i for i, owner in enumerate(self.owners)}
        wanted = [None if owner is None else index.get(owner, -1) for owner in (source, destination)]
        for group in self.groups:
            if -1 not in wanted:
                yield from copies_of(group, self.owners, *wanted)


def padding_views(source: Layout, destination: Layout) -> tuple[View, ...]:
    """Views between tensors of which one side has a few more rows: those that pad a vocabulary for its ranks."""
    views = []
    for name in (name for name in source.params if name in destination.params):
        few, many = sorted((source, destination), key=lambda layout: layout.params[name].shape)
        rows, shape = few.params[name].shape[:1], many.params[name].shape
        if rows and few.params[name].shape[1:] == shape[1:] and 0 < shape[0] - rows[0] < len(many.ranks):
            views.append(View.first_rows(name, shape, rows[0]))
    return tuple(views)


def plan(
    source: Layout | Iterable[TensorMetadata],
    destination: Layout | Iterable[TensorMetadata],
    views: Sequence[View] = (),
    *,
    colocated: bool = False,
    allow_missing: bool = False,
) -> Plan:
    """Plan the copies that fill every tensor of `destination` from `source`.

    Args:
        source: A layout, or tensors with their owners (ranks of a mesh, files, chunks).
        destination: The same. It decides: what it does not name is not copied (see `Plan.unused`).
        views: For tensors with different names or shapes on the two sides, in either direction.
        colocated: Rank r of both sides is one process, so what it holds already does not travel. Otherwise the two
            sides are different machines, whatever their ranks are called.
        allow_missing: Accept destination elements that no source has (padding); `Plan.missing` counts them.

    Raises BridgeError when a tensor is missing, has another shape, or is not covered.
    """
    sources, destinations = by_name(source), by_name(destination)
    items, unused, missing = match(sources, destinations, views, allow_missing=allow_missing)
    batches: dict[tuple[int, tuple], list[Item]] = {}
    for item in items:
        batches.setdefault((item.destination.dtype.itemsize, _alike(item)), []).append(item)
    geometries: dict[tuple, Geometry] = {}
    work = []
    for (width, alike), batch in batches.items():
        if alike not in geometries:
            geometries[alike] = _geometry(batch[0])
        _check_missing(geometries[alike], batch, missing, allow_missing)
        work.append((geometries[alike], width, batch))
    # Tensors that only one owner can send come first: replicas then make up for what those weigh.
    work.sort(key=lambda w: (w[0].source.slots.shape[1], -w[0].pair_elements.max(initial=0) * w[1]))
    ledger = Ledger([*sources.values(), *destinations.values()])
    groups = tuple(choose(geometry, width, batch, ledger, colocated) for geometry, width, batch in work)
    owners = tuple(ledger.index)
    result = Plan(
        groups=groups,
        owners=owners,
        sent={owners[i]: int(ledger.sent[i]) for i in ledger.of(sources)},
        received={owners[i]: int(ledger.received[i]) for i in ledger.of(destinations)},
        load_floor=ledger.floor(),
        lower_bound=sum(ledger.lacking.values()),
        unused=unused,
        missing=missing,
    )
    assert result.bytes == result.lower_bound == sum(result.received.values()), "more travels than is lacking"
    return result


def _alike(item: Item) -> tuple:
    """Equal for items with the same geometry."""
    view = item.view
    key: list[object] = []
    if view is not None:
        key += [item.external_source, view.shape, view.factors, view.index, view.permute]
    for tensor in (item.source, item.destination):
        key += [tensor.shape, tensor.on and (tensor.on.mesh.shape, tensor.on.placements)]
        key += [chunk.box for chunk in tensor.chunks]
    return tuple(key)


def _geometry(item: Item) -> Geometry:
    view = item.view
    if view is None:
        frames, sizes = [identity_frame(item.source.shape)] * 2, item.source.shape
    else:
        frames, sizes = [external_frame(view), titan_frame(view)], view.index_shape
        frames = frames if item.external_source else frames[::-1]
    return Geometry(
        side_of(item.source, frames[0], sizes, source=True),
        side_of(item.destination, frames[1], sizes, source=False),
    )


def _check_missing(geometry: Geometry, items: list[Item], missing: dict[str, int], allowed: bool) -> None:
    """Only chunks can leave holes: placements always cover."""
    holes = int(geometry.missing.sum())
    for item in items if holes else ():
        name = item.destination.name
        if not allowed:
            raise BridgeError(f"{name}: {holes} elements of {item.source.name} are in no source chunk")
        missing[name] = missing.get(name, 0) + holes
