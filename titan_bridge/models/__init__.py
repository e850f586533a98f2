"""Hugging Face configs and checkpoints as TorchTitan models: one file a family, found by listing them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from torchtitan.models.common.decoder import Decoder

from titan_bridge.device import use_cpu_if_no_accelerator
from titan_bridge.errors import BridgeError
from titan_bridge.models.family import Family, load_hf_config
from titan_bridge.models.fields import UnsupportedModelError

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
    """Every family: the ``FAMILY`` of each module in this package that has one, by name."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    use_cpu_if_no_accelerator()
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return tuple(sorted(found, key=lambda family: family.name))


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
        BridgeError: No family uses its model class.
    """
    for family in families():
        if isinstance(config, family.model_class.Config):
            return family
    classes = ", ".join(family.model_class.__name__ for family in families())
    raise BridgeError(f"{type(config).__qualname__} belongs to no family here; allowed: configs of {classes}")
