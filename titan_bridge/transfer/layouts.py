"""From what every rank says about itself to the two layouts and the one plan between a trainer and an engine.

Each trainer rank and each worker tells the layout of what it holds, in its own numbering. Trainer rank 0 puts them
together in one numbering (trainer ranks first, then the engine's workers); everybody makes the same plan from it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter
from torch.distributed.tensor import Replicate

from titan_bridge.errors import BridgeError, few
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.plan import Plan, plan
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.sharding.view import View

VIEWS = TypeAdapter(tuple[View, ...])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides:
    """Trainer and one engine; workers are numbered after the trainer's ranks."""

    source: Layout
    destination: Layout
    trainers: int
    unpadded: Mapping[str, int]  # rows without padding of the engine's tensors that have some
    views: tuple[View, ...] = ()  # only if the two sides name tensors differently

    @property
    def dtypes(self) -> dict[str, str]:
        """Of the engine's tensors, by name: what travels."""
        return {name: param.dtype for name, param in self.destination.params.items()}

    def to_json(self) -> dict[str, Any]:
        plain = {"source": self.source.to_json(), "destination": self.destination.to_json()}
        return {**vars(self), **plain, "views": VIEWS.dump_python(self.views)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sides:
        read: dict[str, Any] = {**data, "views": VIEWS.validate_python(data["views"])}
        return cls(**read | {side: Layout.from_json(data[side]) for side in ("source", "destination")})

    def plan(self) -> Plan:
        """The copies of a dense update. Raises BridgeError for a tensor that the trainer lacks, or another shape."""
        views, params = [*self.views], self.destination.params
        viewed = {(view.name, view.fqn) for view in views}
        for name, rows in self.unpadded.items():  # by the same name, without the engine's padding rows
            shape, held = params[name].shape, self.source.params.get(name)
            if (name, name) not in viewed and held and held.shape == (rows, *shape[1:]) != shape:
                views.append(View.first_rows(name, shape, rows))
        made = plan(self.source, self.destination, views, allow_missing=bool(self.unpadded))
        padding = {
            name: (params[name].shape[0] - rows) * math.prod(params[name].shape[1:])
            for name, rows in self.unpadded.items()
        }
        if lost := sorted(name for name, elements in made.missing.items() if elements != padding.get(name)):
            there = f"({len(lost)} such tensors); the trainer has {few(self.source.params)}"
            raise BridgeError(f"the engine's {lost[0]} is in no tensor of the trainer {there}")
        return made


def merge(parts: Mapping[int, Layout], what: str) -> Layout:
    """One layout of what several ranks hold: what each knows, by rank; all meshes have the same numbering.

    Tensors on different meshes with the same placements (replicas of an engine, copies in several pipeline
    stages) become one tensor on a mesh with one more axis. BridgeError for ranks that contradict each other, and for
    one of a tensor's mesh that did not speak of it; `what` they are of: "trainer" or "engine".
    """
    first: dict[str, ParamLayout] = {}
    told: dict[str, dict[MeshLayout, set[int]]] = {}
    for rank, layout in parts.items():
        for name, param in layout.params.items():
            other = first.setdefault(name, param)
            mine = (param.shape, param.dtype, param.spec.placements)
            if mine != (other.shape, other.dtype, other.spec.placements):
                raise BridgeError(f"{what} ranks contradict each other on {name}: {other} and {param}")
            told.setdefault(name, {}).setdefault(layout.meshes[param.spec.mesh], set()).add(rank)
    meshes: dict[MeshLayout, str] = {}
    params: dict[str, ParamLayout] = {}
    for name, known in told.items():
        for mesh, spoke in known.items():
            if silent := sorted(set(mesh.ranks) - spoke):
                raise BridgeError(f"{name} lies on {what} ranks {mesh.ranks}, but rank {silent[0]} lacks it")
        mesh, *others = sorted(known, key=lambda each: each.ranks)
        placements = first[name].spec.placements
        if others:
            ranks = [rank for each in (mesh, *others) for rank in each.ranks]
            if any(other.shape != mesh.shape for other in others) or len(set(ranks)) != len(ranks):
                raise BridgeError(f"{name}: {what} meshes that differ or overlap: {mesh} and {others[0]}")
            mesh = MeshLayout.make(("copy", *mesh.axes), (len(others) + 1, *mesh.shape), ranks)
            placements = (Replicate(), *placements)
        spec = ShardingSpec(mesh=meshes.setdefault(mesh, f"{what}{len(meshes)}"), placements=placements)
        params[name] = dataclasses.replace(first[name], spec=spec)
    return Layout(meshes={name: mesh for mesh, name in meshes.items()}, params=params)


def shifted(layout: Layout, by: int) -> Layout:
    """The same layout with `by` added to every rank."""
    meshes = {
        name: dataclasses.replace(mesh, ranks=tuple(rank + by for rank in mesh.ranks))
        for name, mesh in layout.meshes.items()
    }
    return Layout(meshes=meshes, params=layout.params)


def join_sides(trainers: Sequence[Mapping[str, Any]], workers: Sequence[Mapping[str, Any]]) -> Sides:
    """Both sides from what all ranks told: layouts of the trainer's; of workers "rank" and "unpadded", too."""
    source = {rank: _parsed(json.dumps(told)) for rank, told in enumerate(trainers)}
    held, unpadded = {}, {}
    for at, told in enumerate(workers, len(trainers)):
        held[at] = shifted(_parsed(json.dumps(told["layout"])), at - told["rank"])
        unpadded |= told["unpadded"]
    sides = {"source": merge(source, "trainer"), "destination": merge(held, "engine")}
    return Sides(**sides, trainers=len(trainers), unpadded=unpadded)


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Layout:
    """Once for the many ranks that say the same."""
    return Layout.from_json(json.loads(text))
