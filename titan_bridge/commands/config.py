"""`titan-bridge config`: look at the TOML files, without running anything."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import tyro

from titan_bridge.errors import BridgeError
from titan_bridge.json_file import finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Print the values of a TOML file and where each comes from, or what the files may say.

    Example: titan-bridge config configs/infer/qwen3_moe_tp2_ep2.toml --set parallel.tp=4
    """

    file: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]", help_behavior_hint="")
    ] = None
    """A .toml file (see configs/infer/ and configs/train/)."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Set one key, for instance --set parallel.tp=2; may be repeated."""
    schema: bool = False
    """Print the JSON Schema of each kind of file, by kind."""
    table: bool = False
    """Print the keys of each kind of file as Markdown tables (they are in configs/README.md)."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        from titan_bridge.config import reader  # pydantic and tomli, not needed for --help
        from titan_bridge.config.kinds import KINDS, kind_of

        if self.schema:
            print(json.dumps({kind: reader.json_schema(schema) for kind, schema in KINDS.items()}, indent=2))
            return 0
        if self.table:
            from titan_bridge.config.table import markdown

            print(markdown(KINDS))
            return 0
        if self.file is None:
            raise BridgeError("nothing to show; give a .toml file, --schema or --table")
        rows = reader.resolve(KINDS[kind_of(self.file)], file=self.file, sets=self.set).table()
        if self.json:
            print(
                json.dumps({key: {"value": finite(value), "origin": origin} for key, value, origin in rows})
            )
            return 0
        width = max(len(key) for key, _, _ in rows)
        for key, value, origin in rows:
            print(f"{key:<{width}}  {json.dumps(value):<24}  {origin}")
        return 0
