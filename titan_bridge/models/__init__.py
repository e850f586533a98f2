"""Hugging Face configs and checkpoints as TorchTitan models: one file a family, found by listing them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from titan_bridge import parallelize
from titan_bridge.errors import BridgeError
from titan_bridge.models.adapter import adds_nothing
from titan_bridge.models.family import Family, load_hf_config
from titan_bridge.models.fields import UnsupportedModelError

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder

__all__ = [
    "Family",
    "UnsupportedModelError",
    "families",
    "family_for",
    "family_of",
    "load_hf_config",
]


@cache
def families() -> tuple[Family, ...]:
    """Every family, by name: the ``FAMILY`` of each module here that has a twin in ``parallelize/``."""
    names = sorted(info.name for info in pkgutil.iter_modules(parallelize.__path__))
    return tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in names)


def family_for(hf: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json.

    Raises:
        UnsupportedModelError: No family lists its architecture; the message lists those that are known.
    """
    known = {architecture: family for family in families() for architecture in family.architectures}
    architectures = hf.get("architectures") or []
    for architecture in architectures:
        if architecture in known:
            return known[architecture]
    given = (
        f"architecture {', '.join(map(str, architectures))} is not supported"
        if architectures
        else ("config.json names no architecture")
    )
    raise UnsupportedModelError(f"{given}; allowed: {', '.join(sorted(known))}")


def family_of(config: Decoder.Config) -> Family:
    """The family of a TorchTitan config tree.

    Raises:
        BridgeError: No family uses its model class, or it adds to one that a family uses.
    """
    for family in families():
        if isinstance(config, family.model_class.Config) and adds_nothing(
            type(config), family.model_class.Config
        ):
            return family
    classes = ", ".join(family.model_class.__name__ for family in families())
    raise BridgeError(
        f"{type(config).__module__}.{type(config).__qualname__} belongs to no family here; "
        f"allowed: configs of {classes}"
    )
