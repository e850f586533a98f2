"""Which families there are: those in this package, those that installed packages bring, and those that were registered.

A package brings one with an entry point in the group `titan_bridge.families`, in its pyproject.toml:

    [project.entry-points."titan_bridge.families"]
    tiny = "tiny_model.family:FAMILY"

A notebook calls `register("my_module:FAMILY")` instead; processes that it starts afterwards know the family, too.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from titan_bridge import parallelize
from titan_bridge.errors import BridgeError
from titan_bridge.models.adapter import adds_nothing
from titan_bridge.models.family import Family
from titan_bridge.models.fields import UnsupportedModelError

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder

GROUP = "titan_bridge.families"
"""The entry point group."""
REGISTERED = "TITAN_BRIDGE_FAMILIES"
"""Environment variable with what `register` was given, separated by commas."""

_NOT_YET = {
    "Qwen3_5": "TorchTitan's qwen3_5 imports Triton kernels when it is loaded",
    "MuseGlimmer": "TorchTitan's muse_glimmer has a mesh axis of its own",
}
"""Beginning of an architecture that TorchTitan has and we do not, and why."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A family, or why it cannot be used; both where something else about it is wrong."""

    source: str
    """Where it comes from, for messages."""
    family: Family | None = None
    problem: str | None = None


@cache
def candidates() -> tuple[Candidate, ...]:
    """Every family that was found, ours first, and why it cannot be used, if it cannot."""
    package = __name__.rpartition(".")[0]
    names = sorted(info.name for info in pkgutil.iter_modules(parallelize.__path__))
    found = [
        Candidate(source="titan_bridge", family=importlib.import_module(f"{package}.{name}").FAMILY)
        for name in names
    ]
    for source, load in _outside():
        new = _load(source, load)
        known = {other.family.name: other for other in reversed(found) if other.family}
        taken = known.get(new.family.name) if new.family else None
        if taken is not None and new.family is not None:
            if taken.family is new.family:
                continue  # registered, and an entry point, too
            problem = f"its name {new.family.name!r} is taken by a family of {taken.source}"
            new = replace(new, problem=problem)
        found.append(new)
    return tuple(found)


def _outside() -> Iterator[tuple[str, Callable[[], Any]]]:
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        package = point.dist.name if point.dist else "an unknown package"
        yield f"entry point {point.name} = {point.value!r} of {package}", point.load
    for target in filter(None, os.environ.get(REGISTERED, "").split(",")):
        yield f"{REGISTERED}={target}", lambda target=target: _imported(target)


def _load(source: str, load: Callable[[], Any]) -> Candidate:
    try:
        family = load()
    except Exception as error:  # somebody else's module
        return Candidate(source=source, problem=f"{type(error).__name__}: {error}")
    if not isinstance(family, Family):
        return Candidate(source=source, problem=f"it is a {type(family).__qualname__}, not a Family")
    for name in ("name", "architectures"):
        if not hasattr(family, name):
            return Candidate(source=source, problem=f"{type(family).__qualname__} has no {name}")
    return Candidate(source=source, family=family)


def _imported(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name or "FAMILY")


def register(target: str) -> None:
    """Make a family known in this process and in those that it starts, e.g. ``register("my_module:FAMILY")``.

    Raises:
        BridgeError: It cannot be imported, or is no `Family`.
    """
    found = _load(target, lambda: _imported(target))
    if found.problem:
        raise BridgeError(f"{target!r} cannot be registered: {found.problem}")
    given = os.environ.get(REGISTERED, "").split(",")
    os.environ[REGISTERED] = ",".join(dict.fromkeys([*filter(None, given), target]))
    candidates.cache_clear()


def families() -> tuple[Family, ...]:
    """Every family that can be used: ours by name, then those of other packages."""
    return tuple(found.family for found in candidates() if found.family and not found.problem)


def claims_of(architecture: str) -> list[Candidate]:
    """The families that list an architecture; more than one are too many."""
    return [found for found in candidates() if found.family and architecture in found.family.architectures]


def family_for(hf: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json.

    Raises:
        UnsupportedModelError: No family lists its architecture, or two do; the message says what is known, and which
            families cannot be used, and why.
    """
    architectures = [str(name) for name in hf.get("architectures") or []]
    for architecture in architectures:
        claims = claims_of(architecture)
        if len(claims) > 1:
            sources = "; ".join(found.source for found in claims)
            raise UnsupportedModelError(
                f"architecture {architecture} is claimed twice: {sources}; remove one"
            )
        if claims:
            family = claims[0].family
            assert family is not None
            if problem := claims[0].problem:
                raise UnsupportedModelError(f"{claims[0].source} cannot be used: {problem}")
            stated, right = hf.get("model_type"), family.model_types.get(architecture)
            if stated and right and stated != right:
                raise UnsupportedModelError(
                    f"config.json contradicts itself: architecture {architecture} and model_type={stated!r}; "
                    f"allowed with it: {right!r}"
                )
            return family
    raise UnsupportedModelError(_unknown(architectures))


def _unknown(architectures: list[str]) -> str:
    if not architectures:
        given = "config.json names no architecture"
    else:
        given = f"architecture {', '.join(architectures)} is not supported"
        reasons = [
            why for start, why in _NOT_YET.items() if any(name.startswith(start) for name in architectures)
        ]
        given += "".join(f" ({why})" for why in reasons)
    known = sorted(name for family in families() for name in family.architectures)
    broken = [f"{found.source} cannot be used: {found.problem}" for found in candidates() if found.problem]
    return "; ".join([given, f"allowed: {', '.join(known)}", *broken])


def family_of(config: Decoder.Config) -> Family:
    """The family of a TorchTitan config tree.

    Raises:
        BridgeError: No family uses its model class, or it adds to one that a family uses.
    """
    for family in families():
        kind = family.model_class.Config
        if isinstance(config, kind) and adds_nothing(type(config), kind):
            return family
    classes = ", ".join(family.model_class.__name__ for family in families())
    raise BridgeError(
        f"{type(config).__module__}.{type(config).__qualname__} belongs to no family here; "
        f"allowed: configs of {classes}"
    )
