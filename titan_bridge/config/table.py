"""The keys of the TOML files as Markdown tables, made from their JSON Schemas; configs/README.md shows them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from titan_bridge.config.reader import fields_of, json_schema

BEGIN = "<!-- keys: made by `titan-bridge config --table` -->"
END = "<!-- keys: end -->"

_NAMES = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "object": "table",
}
_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "over",
    "maximum": "at most",
    "exclusiveMaximum": "under",
}


def markdown(kinds: Mapping[str, type[Any]]) -> str:
    """A folded table for each kind, between the two markers.

    Args:
        kinds: Kind of TOML file -> its config class.

    Returns:
        Lines of Markdown without a newline at the end.
    """
    parts = [BEGIN]
    for kind, schema in kinds.items():
        rows = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
        rows += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in key_rows(schema)]
        summary = f"<summary>Keys of <code>configs/{kind}/*.toml</code></summary>"
        parts += ["<details>", summary, "", *rows, "", "</details>"]
    return "\n".join([*parts, END])


def key_rows(schema: type[Any]) -> list[tuple[str, str, str, str]]:
    """Key, what is allowed, default and meaning of every value of a config class.

    In the order of its fields, but a table's own values come before the tables in it, as TOML wants them written.
    """
    whole = json_schema(schema)
    return list(_rows(schema, whole, whole.get("$defs", {}), ""))


def _rows(
    schema: type[Any], table: Mapping[str, Any], classes: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, str, str, str]]:
    fields = fields_of(schema)
    assert fields is not None, f"{schema} is no config class"
    nested = {name: kind for name, kind in fields.items() if dataclasses.is_dataclass(kind)}
    for name in (name for name in fields if name not in nested):
        yield _row(prefix + name, table["properties"][name], required=name in table.get("required", ()))
    for name, kind in nested.items():
        yield from _rows(kind, classes[kind.__name__], classes, f"{prefix}{name}.")


def _row(key: str, field: Mapping[str, Any], *, required: bool) -> tuple[str, str, str, str]:
    kinds = [kind for kind in field.get("anyOf", (field,)) if kind.get("type") != "null"]
    if required:
        default = "required"
    elif field.get("default") is None:
        default = "empty" if kinds[0]["type"] == "object" else "none"
    else:
        default = f"`{json.dumps(field['default'])}`"
    return f"`{key}`", " or ".join(map(_allowed, kinds)), default, field["description"]


def _allowed(kind: Mapping[str, Any]) -> str:
    if "enum" in kind:
        return ", ".join(map(str, kind["enum"]))
    if kind.get("type") == "array":
        return f"list of {_allowed(kind['items'])}"
    limits = [f"{words} {kind[limit]}" for limit, words in _LIMITS.items() if limit in kind]
    return ", ".join([_NAMES[kind.get("type", "object")], *limits])  # a class of its own is a table


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
