"""The kinds of TOML files; the folder under configs/ has the name of the kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from titan_bridge.config.schema import SCHEMAS
from titan_bridge.config.train_schema import TrainConfig

KINDS: dict[str, type[Any]] = {**SCHEMAS, "train": TrainConfig}
"""Kind -> its class."""


def kind_of(file: str | Path) -> str:
    """The kind of a file, by the folder that it lies in; elsewhere it counts as one for inference."""
    folder = Path(file).absolute().parent.name
    return folder if folder in KINDS else "infer"
