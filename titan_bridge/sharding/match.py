"""Which source tensor fills which destination tensor: by name, or by a view."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from titan_bridge.errors import BridgeError, few
from titan_bridge.sharding.boxes import meeting
from titan_bridge.sharding.tensors import TensorMetadata
from titan_bridge.sharding.view import View


@dataclass(frozen=True)
class Item:
    """One source tensor that fills one destination tensor, or the part of it that a view selects."""

    source: TensorMetadata
    destination: TensorMetadata
    view: View | None  # None: same shape, same elements in the same places
    external_source: bool
    """With a view: True when the source is the external tensor, False when it is the TorchTitan one."""


def match(
    sources: Mapping[str, TensorMetadata],
    destinations: Mapping[str, TensorMetadata],
    views: Sequence[View],
    *,
    allow_missing: bool,
) -> tuple[list[Item], tuple[str, ...], dict[str, int]]:
    """The items that fill every destination, the source names nobody asked for, and the uncovered elements.

    A destination is filled by the views whose TorchTitan name it has and whose external names are sources; else by one
    view the other way round; else by the source of the same name.
    Raises BridgeError when that is not enough.
    """
    by_fqn: dict[str, list[View]] = {}
    by_name: dict[str, list[View]] = {}
    for view in views:
        by_fqn.setdefault(view.fqn, []).append(view)
        by_name.setdefault(view.name, []).append(view)
    items: list[Item] = []
    uncovered: dict[str, int] = {}
    disjoint: set[tuple] = set()
    for name, held in destinations.items():
        # A view of a tensor onto itself (its rows without padding) goes one way only: its shapes say which.
        parts = [view for view in by_fqn.get(name, ()) if view.name in sources]
        parts = [view for view in parts if view.name != name or held.shape == view.titan_shape]
        whole = [view for view in by_name.get(name, ()) if view.fqn in sources]
        if parts:
            items += [_item(sources[view.name], held, view, external_source=True) for view in parts]
            lacking = _check_cover(name, held, parts, disjoint)
            if lacking and not allow_missing:
                absent = [view.name for view in by_fqn[name] if view.name not in sources]
                why = f"missing: {', '.join(absent[:3])}" if absent else "its views do not cover it"
                total = math.prod(held.shape)
                raise BridgeError(f"{name}: {lacking} of {total} elements come from no source tensor; {why}")
            if lacking:
                uncovered[name] = lacking
        elif whole:
            items.append(_item(sources[whole[0].fqn], held, whole[0], external_source=False))
        elif name in sources:
            if sources[name].shape != held.shape:
                shapes = f"shape {sources[name].shape} in the source and {held.shape} in the destination"
                raise BridgeError(f"{name} has {shapes}; give a view that says which part is which")
            items.append(Item(sources[name], held, None, False))
        elif allow_missing:
            uncovered[name] = math.prod(held.shape)
        else:
            wanted = [view.name for view in by_fqn.get(name, ())]
            wanted = wanted or [view.fqn for view in by_name.get(name, ())]
            hint = f"it would be filled from {', '.join(wanted[:3])}" if wanted else "nor does a view name it"
            raise BridgeError(f"{name} is in no source tensor; {hint}; the source has {few(sources)}")
    used = {item.source.name for item in items}
    return items, tuple(name for name in sources if name not in used), uncovered


def _item(source: TensorMetadata, destination: TensorMetadata, view: View, *, external_source: bool) -> Item:
    external, titan = (source, destination) if external_source else (destination, source)
    for held, shape in ((external, view.shape), (titan, view.titan_shape)):
        if held.shape != shape:
            needs = f"view {view.name} -> {view.fqn} needs {shape}"
            raise BridgeError(f"{held.name} has shape {held.shape}; {needs}")
    return Item(source, destination, None if view.is_identity else view, external_source)


def _check_cover(name: str, held: TensorMetadata, views: list[View], disjoint: set[tuple]) -> int:
    """Elements of a TorchTitan tensor that no view writes. Raises BridgeError when two views write the same one."""
    # Layers look alike, and experts are many: look at each pattern once.
    pattern = tuple((view.factors, view.index) for view in views)
    if pattern not in disjoint:
        if clash := _clash(views):
            raise BridgeError(f"{name}: views {clash[0].name} and {clash[1].name} write the same elements")
        disjoint.add(pattern)
    return math.prod(held.shape) - sum(math.prod(view.shape) for view in views)


def _clash(views: list[View]) -> tuple[View, View] | None:
    by_factors: dict[tuple, list[View]] = {}
    for view in views:
        by_factors.setdefault(view.factors, []).append(view)
    for alike in by_factors.values():
        index = np.asarray([view.index for view in alike], dtype=np.int64).reshape(len(alike), -1, 2)
        boxes = index[:, :, 0], index[:, :, 1]
        for i, j in zip(*meeting(boxes, boxes), strict=True):
            if i < j:
                return alike[i], alike[j]
    # Factored in different ways (q with rotary halves, v without): compare the positions in each dim.
    for group, other in itertools.combinations(by_factors.values(), 2):
        for a, b in itertools.product(group, other):
            if all(np.intersect1d(*dim).size for dim in zip(_positions(a), _positions(b), strict=True)):
                return a, b
    return None


def _positions(view: View) -> list[np.ndarray]:
    """For each dim of the TorchTitan tensor, the positions that a view selects."""
    result, at = [], 0
    for factors in view.factors:
        place = tuple(slice(*ends) for ends in view.index[at : at + len(factors)])
        result.append(np.arange(math.prod(factors)).reshape(factors)[place].ravel())
        at += len(factors)
    return result
