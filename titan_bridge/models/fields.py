"""Read a Hugging Face config with the answer to a bad value ready: which field, what it said, what is
allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from titan_bridge.errors import BridgeError

_REQUIRED = object()


class UnsupportedModelError(BridgeError):
    """The config names an architecture, a field or a value that no model family here can represent."""


class Fields:
    """Typed access to the fields of one Hugging Face config.

    A field that is missing or ``null`` takes the default, as it does in transformers; without a default it is
    an error. Fields that are never asked for are ignored, as transformers does with fields its class does not
    know.
    """

    def __init__(self, hf: Mapping[str, Any], architecture: str) -> None:
        self.hf = hf
        self.architecture = architecture

    def integer(
        self, *names: str, default: Any = _REQUIRED, minimum: int = 1, maximum: int | None = None
    ) -> int:
        """The first of ``names`` that is present, as an int of at least ``minimum`` and at most ``maximum``."""
        name, value = self._first(names, default)
        small = isinstance(value, bool) or not isinstance(value, int) or value < minimum
        if small or (maximum is not None and value > maximum):
            at_most = f" and at most {maximum}" if maximum is not None else ""
            raise self.refusal(name, value, f"an integer of at least {minimum}{at_most}")
        return value

    def number(self, name: str, *, default: Any = _REQUIRED) -> float:
        """A positive and finite number."""
        name, value = self._first((name,), default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.refusal(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        name, value = self._first((name,), default)
        if not isinstance(value, bool):
            raise self.refusal(name, value, "true or false")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of non-negative integers; empty when missing."""
        name, value = self._first((name,), ())
        if not isinstance(value, (list, tuple)) or any(type(item) is not int or item < 0 for item in value):
            raise self.refusal(name, value, "a list of layer numbers")
        return tuple(value)

    def only(self, name: str, allowed: Collection[Any]) -> None:
        """Refuse ``name`` unless it is missing or one of ``allowed``."""
        value = self.hf.get(name)
        if value is not None and value not in allowed:
            raise self.refusal(name, value, ", ".join(_spelt(item) for item in allowed) or "leaving it out")

    def refusal(self, name: str, value: Any, allowed: str) -> UnsupportedModelError:
        """The error for a value that is not allowed, ready to raise."""
        return UnsupportedModelError(
            f"{self.architecture}: {name}={_spelt(value)} in config.json is not supported; allowed: {allowed}"
        )

    def _first(self, names: Collection[str], default: Any) -> tuple[str, Any]:
        for name in names:
            if self.hf.get(name) is not None:
                return name, self.hf[name]
        first = next(iter(names))
        if default is _REQUIRED:
            raise UnsupportedModelError(
                f"{self.architecture}: config.json has no {first}, which is needed; add it"
            )
        return first, default


def _spelt(value: Any) -> str:
    """``value`` as JSON spells it, shortened to one readable line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
