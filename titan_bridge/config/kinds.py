"""The kinds of TOML files; the folder under configs/ has the name of the kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from titan_bridge.config.reader import known_keys, read_toml
from titan_bridge.config.schema import SCHEMAS
from titan_bridge.config.train_schema import TrainConfig

KINDS: dict[str, type[Any]] = {**SCHEMAS, "train": TrainConfig}
"""Kind -> its class."""


def kind_of(file: str | Path) -> str:
    """The kind that knows most keys of a file; "infer" where two know as many.

    Raises:
        BridgeError: no such file, or not TOML.
    """
    values = read_toml(Path(file))
    return max(KINDS, key=lambda kind: known_keys(KINDS[kind], values))
