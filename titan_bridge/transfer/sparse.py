"""Sparse updates: changed elements in global coordinates, each sent to the ranks that hold it and to no other.

A patch names a tensor of the trainer's or of a Hugging Face checkpoint. The sender looks up for every entry which
ranks hold it and where in their local tensors: O(entries), whatever the size of the tensor. What travels is the
position in the receiver's local tensor (int32 where that suffices) and the value in the receiver's dtype; the
receiver scatters them as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.boxes import axes_of, segments_of
from titan_bridge.sharding.layout import Layout
from titan_bridge.sharding.view import View


@dataclass(frozen=True, kw_only=True)
class Patch:
    """New values of some elements of one tensor."""

    name: str
    """A TorchTitan FQN, or the name of a Hugging Face tensor."""
    indices: torch.Tensor
    """int64 or int32 `[n]`: flat row-major positions in the global tensor of that name; no position twice."""
    values: torch.Tensor
    """`[n]`; cast to the engine's dtype."""

    def __post_init__(self) -> None:
        if self.indices.dtype not in (torch.int32, torch.int64):
            raise BridgeError(f"{self.name}: indices are {self.indices.dtype}; allowed: int32, int64")
        if self.indices.ndim != 1 or self.values.shape != self.indices.shape:
            raise BridgeError(
                f"{self.name}: indices {tuple(self.indices.shape)} and values {tuple(self.values.shape)}; "
                "give two flat tensors of one length"
            )


@dataclass(kw_only=True)
class Entries:
    """What one rank gets of one tensor."""

    positions: torch.Tensor
    """int32 or int64: flat positions in the rank's local tensor."""
    values: torch.Tensor


@dataclass(kw_only=True)
class Outbox:
    """Entries by destination rank and tensor."""

    to: dict[int, dict[str, list[Entries]]] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        return sum(len(e.positions) for t in self.to.values() for parts in t.values() for e in parts)


class Router:
    """Where every element of the engine's tensors lives.

    Args:
        destination: The engine's layout.
        views: The engine's views of Hugging Face tensors, and padding views (see `Sides`).
    """

    def __init__(self, destination: Layout, views: Sequence[View] = ()) -> None:
        self._destination = destination
        self._by_name: dict[str, list[View]] = {}
        self._by_fqn: dict[str, list[View]] = {}
        for view in views:
            self._by_name.setdefault(view.name, []).append(view)
            self._by_fqn.setdefault(view.fqn, []).append(view)
        self._maps: dict[tuple, _Holders] = {}

    def route(self, patches: Iterable[Patch]) -> Outbox:
        """Sort the entries of all patches by the ranks that hold them.

        Raises:
            BridgeError: A name that neither side knows, an index outside the tensor, or one that is given twice.
        """
        outbox = Outbox()
        for patch in patches:
            indices = patch.indices.long()
            for name, flat, values in self._targets(patch, indices):
                self._spread(outbox, name, flat, values)
        return outbox

    def _targets(
        self, patch: Patch, indices: torch.Tensor
    ) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
        """(name in the engine, flat positions there, values)."""
        name, values = patch.name, patch.values.detach()
        pad = next((v for v in self._by_name.get(name, ()) if v.fqn == name), None)
        if pad is None and name in self._destination.params:
            check_indices(name, indices, math.prod(self._destination.params[name].shape))
            yield name, indices, values
            return
        known = [view for view in self._by_name.get(name, ()) if view.fqn in self._destination.params]
        if known:
            check_indices(name, indices, math.prod(known[0].shape))
            yield known[0].fqn, to_titan(known[0], indices), values
            return
        outward = [view for view in self._by_fqn.get(name, ()) if view.name in self._destination.params]
        if not outward:
            raise BridgeError(f"patch for {name}: the engine has no tensor of this name, nor a view of it")
        check_indices(name, indices, math.prod(outward[0].titan_shape))
        for view in outward:
            inside, flat = to_external(view, indices)
            if len(flat):
                yield view.name, flat, values[inside]

    def _spread(self, outbox: Outbox, name: str, flat: torch.Tensor, values: torch.Tensor) -> None:
        if not len(flat):
            return
        param = self._destination.params[name]
        mesh = self._destination.meshes[param.spec.mesh]
        key = (param.shape, mesh, param.spec.placements)
        if key not in self._maps:
            self._maps[key] = _Holders(self._destination, name)
        values = values.to(getattr(torch, param.dtype))
        for ranks, chosen, positions in self._maps[key].find(flat):
            part = values if chosen is None else values[chosen]
            for rank in ranks:
                mine = outbox.to.setdefault(rank, {}).setdefault(name, [])
                mine.append(Entries(positions=positions, values=part))


class _Holders:
    """Shard and local position of flat global positions, for one shape, mesh and placements.

    Dims that nobody shards are joined with the dim before them, so that most tensors need no division at all.
    """

    def __init__(self, layout: Layout, name: str) -> None:
        param, mesh = layout.params[name], layout.meshes[layout.params[name].spec.mesh]
        placements = param.spec.placements
        self.sizes: list[int] = []
        """Of the joined dims."""
        self.cuts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] = []
        """For each joined dim, None if no axis shards it; else starts of its segments, their shard, and what to
        add to a global index to get the local one."""
        self.lengths: list[list[int]] = []
        """Local size by joined dim and shard of it."""
        order: list[int] = []
        for dim, size in enumerate(param.shape):
            axes = axes_of(placements, dim)
            if not axes and self.sizes:
                self._join(size)
                continue
            order += axes
            rows, lengths = [], []
            for shard, at in enumerate(itertools.product(*(range(mesh.shape[axis]) for axis in axes))):
                cuts = [(placements[a], mesh.shape[a], c) for a, c in zip(axes, at, strict=True)]
                segments = segments_of(size, cuts)
                lengths.append(sum(b - a for a, b, _ in segments))
                rows += [(a, shard, local - a) for a, _, local in segments]
            self.sizes.append(size)
            self.lengths.append(lengths)
            starts, shards, shifts = zip(*sorted(rows), strict=True) if rows else ((0,), (0,), (0,))
            self.cuts.append(
                (torch.tensor(starts), torch.tensor(shards), torch.tensor(shifts)) if axes else None
            )
        self.shards = [len(lengths) for lengths in self.lengths]
        order += [axis for axis in range(len(mesh.shape)) if axis not in order]
        self.ranks: np.ndarray = mesh.array.transpose(order).reshape(math.prod(self.shards), -1)
        """[shards, replicas]"""

    def _join(self, size: int) -> None:
        self.sizes[-1] *= size
        self.lengths[-1] = [length * size for length in self.lengths[-1]]
        if (cut := self.cuts[-1]) is not None:
            self.cuts[-1] = (cut[0] * size, cut[1], cut[2] * size)

    def find(self, flat: torch.Tensor) -> Iterable[tuple[np.ndarray, torch.Tensor | None, torch.Tensor]]:
        """(ranks of a shard, which of `flat` it holds or None for all, their positions in its local tensor)."""
        index = _unravel(flat, self.sizes) if self.sizes else [flat]
        shard = torch.zeros_like(flat, dtype=torch.int32)
        for dim, cut in enumerate(self.cuts):
            shard *= self.shards[dim]
            if cut is not None:
                segment = torch.searchsorted(cut[0], index[dim], right=True) - 1
                shard += cut[1][segment].to(torch.int32)
                index[dim] = index[dim] + cut[2][segment]
        for which, chosen in _split(shard, math.prod(self.shards)):
            at = np.unravel_index(which, self.shards) if self.shards else ()
            local = [lengths[int(c)] for lengths, c in zip(self.lengths, at, strict=True)]
            mine = index if chosen is None else [part[chosen] for part in index]
            yield self.ranks[which], chosen, _ravel(mine, local or [1]).to(index_dtype(math.prod(local)))


def _split(shard: torch.Tensor, shards: int) -> Iterable[tuple[int, torch.Tensor | None]]:
    """(shard, the entries that it has, in order); None for all."""
    if shards == 1:
        yield 0, None
        return
    if shards <= 8:  # a pass each is cheaper than sorting
        for which in range(shards):
            chosen = (shard == which).nonzero(as_tuple=True)[0]
            if len(chosen):
                yield which, chosen
        return
    order = torch.argsort(shard, stable=True)
    counts = torch.bincount(shard, minlength=shards).tolist()
    at = 0
    for which, count in enumerate(counts):
        if count:
            yield which, order[at : at + count]
        at += count


def index_dtype(numel: int) -> torch.dtype:
    """int32 for local tensors of up to 2^31 elements."""
    return torch.int32 if numel <= 2**31 else torch.int64


def check_indices(name: str, indices: torch.Tensor, numel: int) -> None:
    """Raise BridgeError for an index outside `[0, numel)` or one that appears twice."""
    if not len(indices):
        return
    low, high = torch.aminmax(indices)
    if low < 0 or high >= numel:
        raise BridgeError(
            f"patch for {name}: index {int(low if low < 0 else high)} is outside a tensor of {numel} elements"
        )
    check_unique(name, indices)


def check_unique(name: str, indices: torch.Tensor) -> None:
    """Raise BridgeError when an index appears twice; O(n) for sorted ones, else a sort."""
    steps = indices[1:] > indices[:-1]
    if bool(steps.all()):
        return
    ordered = torch.sort(indices).values
    twice = (ordered[1:] == ordered[:-1]).nonzero()
    if len(twice):
        raise BridgeError(f"patch for {name}: index {int(ordered[twice[0, 0]])} is given twice")


def to_titan(view: View, flat: torch.Tensor) -> torch.Tensor:
    """Flat positions in the external tensor of a view as flat positions in its TorchTitan tensor."""
    index = _unravel(flat, [view.index_shape[dim] for dim in view.permute])
    by_dim: list[torch.Tensor] = [flat] * len(view.permute)
    for at, dim in enumerate(view.permute):
        by_dim[dim] = index[at] + view.index[dim][0]
    return _ravel(by_dim, view.flat_factors)


def to_external(view: View, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which flat positions of the TorchTitan tensor a view selects, and their places in its external tensor."""
    by_dim = _unravel(flat, view.flat_factors)
    inside = torch.ones_like(flat, dtype=torch.bool)
    for index, (start, stop), size in zip(by_dim, view.index, view.flat_factors, strict=True):
        if (start, stop) != (0, size):
            inside &= (index >= start) & (index < stop)
    chosen = inside.nonzero(as_tuple=True)[0]
    moved = [by_dim[dim][chosen] - view.index[dim][0] for dim in view.permute]
    return chosen, _ravel(moved, [view.index_shape[dim] for dim in view.permute])


def _unravel(flat: torch.Tensor, shape: Sequence[int]) -> list[torch.Tensor]:
    result = []
    for size in reversed(shape[1:]):
        outer = torch.div(flat, size, rounding_mode="floor")
        result.insert(0, flat - outer * size)
        flat = outer
    return [flat, *result]


def _ravel(index: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    flat = index[0]
    for part, size in zip(index[1:], shape[1:], strict=True):
        flat = flat * size + part
    return flat
