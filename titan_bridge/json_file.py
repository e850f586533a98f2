"""Read a JSON file that holds an object; what JSON leaves open is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_bridge.errors import BridgeError


def finite(value: Any) -> Any:
    """The value with infinities and NaN as text, which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises BridgeError when it cannot be read, and as `json_object`."""
    try:
        return json_object(path.read_bytes(), path)
    except OSError as error:
        raise BridgeError(f"{path} cannot be read as JSON: {error}") from None


def json_object(text: bytes, where: object) -> dict[str, Any]:
    """The object that `text` (UTF-8) is.

    Raises:
        BridgeError: It is no JSON object, gives a key twice, or has a number that is not finite; starts with `where`.
    """
    try:
        data = json.loads(
            text.decode(), object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite
        )
    except json.JSONDecodeError as error:
        raise BridgeError(f"{where}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise BridgeError(f"{where} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise BridgeError(f"{where} holds a JSON {type(data).__name__}; it must be an object")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r:.80} is given twice in one object; keep one")
    return result


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.80} is no finite number")
    return value
