"""From what every rank says about itself to the two layouts and the one plan between a trainer and an engine.

Each trainer rank and each worker tells the layout of what it holds, in its own numbering. Trainer rank 0 puts them
together in one numbering (trainer ranks first, then the engine's workers); everybody makes the same plan from it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.distributed.tensor import Replicate

from titan_bridge.errors import BridgeError, few
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.plan import Plan, plan
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.sharding.view import View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides:
    """Trainer and one engine; workers are numbered after the trainer's ranks."""

    source: Layout
    destination: Layout
    trainers: int
    workers: int
    unpadded: Mapping[str, tuple[int, ...]]
    """Shape without padding rows of the engine's tensors that have some."""
    views: tuple[View, ...] = ()
    """Only if the two sides name tensors differently."""

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source.to_json(),
            "destination": self.destination.to_json(),
            "trainers": self.trainers,
            "workers": self.workers,
            "unpadded": {name: list(shape) for name, shape in self.unpadded.items()},
            "views": [dataclasses.asdict(view) for view in self.views],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sides:
        return cls(
            source=Layout.from_json(data["source"]),
            destination=Layout.from_json(data["destination"]),
            trainers=data["trainers"],
            workers=data["workers"],
            unpadded={name: tuple(shape) for name, shape in data["unpadded"].items()},
            views=views_from_json(data["views"]),
        )

    def plan(self) -> Plan:
        """The copies of a dense update.

        Raises:
            BridgeError: A tensor of the engine that the trainer does not have, or another shape.
        """
        views, params = [*self.views], self.destination.params
        viewed = {(view.name, view.fqn) for view in views}
        for name, unpadded in self.unpadded.items():  # by the same name, without the engine's padding rows
            held = self.source.params.get(name)
            if (name, name) not in viewed and held and held.shape == unpadded != params[name].shape:
                views.append(View.first_rows(name, params[name].shape, unpadded[0]))
        made = plan(self.source, self.destination, views, allow_missing=bool(self.unpadded))
        if lost := sorted(set(made.missing) - set(self.unpadded)):
            raise BridgeError(
                f"the engine's {lost[0]} is in no tensor of the trainer ({len(lost)} such tensors); the trainer has "
                f"{few(self.source.params)}"
            )
        return made


def views_from_json(data: Iterable[Mapping[str, Any]]) -> tuple[View, ...]:
    """The reverse of `dataclasses.asdict` for views."""
    return tuple(View(**{key: _tuples(value) for key, value in view.items()}) for view in data)


def merge(parts: Mapping[int, Layout], what: str) -> Layout:
    """One layout of what several ranks hold, each having said what it knows.

    Tensors on different meshes with the same placements (replicas of an engine, copies in several pipeline
    stages) become one tensor on a mesh with one more axis.

    Args:
        parts: By rank; the numbering of all meshes is the same.
        what: In errors: "trainer" or "engine".

    Raises:
        BridgeError: Ranks that contradict each other, or a rank of a mesh that did not speak of the tensor.
    """
    told: dict[str, dict[MeshLayout, tuple[ParamLayout, set[int]]]] = {}
    for rank, layout in parts.items():
        for name, param in layout.params.items():
            mesh = layout.meshes[param.spec.mesh]
            known = told.setdefault(name, {})
            first, ranks = known.setdefault(mesh, (param, set()))
            ranks.add(rank)
            for other, _ in known.values():
                if (other.shape, other.dtype, other.spec.placements) != (
                    param.shape,
                    param.dtype,
                    param.spec.placements,
                ):
                    raise BridgeError(f"{what} ranks contradict each other on {name}: {first} and {param}")
    meshes: dict[MeshLayout, str] = {}
    params: dict[str, ParamLayout] = {}
    for name, known in told.items():
        for mesh, (_, ranks) in known.items():
            if silent := sorted(set(mesh.ranks) - ranks):
                raise BridgeError(
                    f"{name} lies on {what} ranks {mesh.ranks}, but rank {silent[0]} does not have it"
                )
        mesh, param = _joined(name, known, what)
        mesh_name = meshes.setdefault(mesh, f"{what}{len(meshes)}")
        params[name] = dataclasses.replace(param, spec=dataclasses.replace(param.spec, mesh=mesh_name))
    return Layout(meshes={name: mesh for mesh, name in meshes.items()}, params=params)


def _joined(
    name: str, known: Mapping[MeshLayout, tuple[ParamLayout, set[int]]], what: str
) -> tuple[MeshLayout, ParamLayout]:
    (mesh, (param, _)), *others = sorted(known.items(), key=lambda item: item[0].ranks)
    if not others:
        return mesh, param
    ranks = [rank for each in (mesh, *(other for other, _ in others)) for rank in each.ranks]
    if any(other.shape != mesh.shape for other, _ in others) or len(set(ranks)) != len(ranks):
        raise BridgeError(f"{name} lies on {what} meshes that differ or overlap: {mesh} and {others[0][0]}")
    joined = MeshLayout.make(("copy", *mesh.axes), (len(others) + 1, *mesh.shape), ranks)
    spec = ShardingSpec(mesh=param.spec.mesh, placements=(Replicate(), *param.spec.placements))
    return joined, dataclasses.replace(param, spec=spec)


def shifted(layout: Layout, by: int) -> Layout:
    """The same layout with `by` added to every rank."""
    meshes = {
        name: dataclasses.replace(mesh, ranks=tuple(rank + by for rank in mesh.ranks))
        for name, mesh in layout.meshes.items()
    }
    return Layout(meshes=meshes, params=layout.params)


def join_sides(trainers: Sequence[Mapping[str, Any]], workers: Sequence[Mapping[str, Any]]) -> Sides:
    """Both sides from what all ranks told: layouts of the trainer's; of workers "rank" and "unpadded", too."""
    first = len(trainers)
    source = merge({rank: layout_from(told) for rank, told in enumerate(trainers)}, "trainer")
    held, unpadded = {}, {}
    for at, told in enumerate(workers, first):
        held[at] = shifted(layout_from(told["layout"]), at - told["rank"])
        unpadded |= {name: tuple(shape) for name, shape in told["unpadded"].items()}
    return Sides(
        source=source,
        destination=merge(held, "engine"),
        trainers=first,
        workers=len(workers),
        unpadded=unpadded,
    )


def layout_from(data: Mapping[str, Any]) -> Layout:
    """`Layout.from_json`, once for the many ranks that say the same."""
    return _parsed(json.dumps(data, sort_keys=False))


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Layout:
    return Layout.from_json(json.loads(text))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
