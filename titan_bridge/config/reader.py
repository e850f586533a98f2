"""Reads TOML into a schema: defaults < file < `--set key=value` < flags, and says where each value came from.

The only file that imports tomli. Every refusal names the file, the key, what was given and what is allowed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import tomli
from pydantic import TypeAdapter, ValidationError

from titan_bridge.errors import BridgeError, did_you_mean

T = TypeVar("T")

COMMAND_LINE = "the command line"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved(Generic[T]):
    """A config and the origin of each value: dotted key -> "default", the file's name, "--set" or a flag."""

    config: T
    origin: Mapping[str, str]

    def table(self) -> list[tuple[str, Any, str]]:
        """Rows (dotted key, value, origin) of every value, in the order of the schema."""
        return [(key, value, self.origin.get(key, "default")) for key, value in _leaves(self.config)]


def resolve(
    schema: type[T],
    *,
    file: str | Path | None = None,
    sets: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    others: Mapping[str, type[Any]] | None = None,
) -> Resolved[T]:
    """Merge the sources and check the result.

    Args:
        schema: a pydantic dataclass, for instance `InferConfig`.
        file: TOML file; None for none.
        sets: `key=value` texts, the key dotted, the value TOML (a bare word is a string).
        flags: dotted key -> value of explicit command-line flags; a None value means that it was not given.
        others: commands that read another kind of file -> its class, so that a mix-up is called one.

    Raises:
        BridgeError: unreadable file, TOML syntax, unknown key, wrong type or value, all in one line.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if file is not None:
        name = str(file)
        values = _underscored(schema, read_toml(Path(file)), name)
        _check_kind(schema, values, name, others or {})
        _check_keys(schema, values, name)
        origin.update({key: name for key, _ in walk(values)})
    for text in sets:
        key, value = parse_set(text)
        if key.startswith("vllm."):  # its keys are vLLM's options, which have both spellings
            table, option, *rest = key.split(".")
            key = ".".join([table, option.replace("-", "_"), *rest])
        elif key == "vllm":
            value = _underscored(schema, {key: value}, "--set vllm")[key]
        _put(schema, values, key, value, f"--set {key}")
        origin[key] = "--set"
    for key, value in (flags or {}).items():
        if value is not None:
            flag = "--" + key.rsplit(".", 1)[-1].replace("_", "-")
            if isinstance(value, Mapping) and key.startswith("vllm."):
                value = _merged((values.get("vllm") or {}).get(key.removeprefix("vllm.")), value)
            _put(schema, values, key, value, flag)
            origin[key] = flag
    try:
        config = from_dict(schema, values)
    except ValidationError as error:
        raise BridgeError(_explain(error, origin, str(file) if file else COMMAND_LINE)) from None
    return Resolved(config=config, origin=origin)


def from_dict(schema: type[T], values: Mapping[str, Any]) -> T:
    """A checked config from plain values; pydantic's own errors."""
    # As JSON: strict mode refuses a dict for a config class and a list for a tuple, but not from JSON.
    return TypeAdapter(schema).validate_json(json.dumps(values, default=str))


def json_schema(schema: type[Any]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a config class."""
    return TypeAdapter(schema).json_schema()


def parse_set(text: str) -> tuple[str, Any]:
    """`"parallel.tp=2"` -> `("parallel.tp", 2)`. The value is TOML; what is no TOML value is a string."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z0-9_.-]+", key):
        raise BridgeError(f"--set {text!r} is not key=value; write for instance --set parallel.tp=2")
    return key, toml_value(value.strip())


def toml_value(text: str) -> Any:
    """The TOML value that `text` spells, or the JSON object or list, or `text` itself."""
    try:
        return tomli.loads(f"v = {text}")["v"] if "\n" not in text else text
    except tomli.TOMLDecodeError:
        pass
    try:
        return json.loads(text) if text.startswith(("{", "[")) else text
    except ValueError:
        return text


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises BridgeError that says what is wrong with it, and where."""
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except tomli.TOMLDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:]
        raise BridgeError(f"{path}:{error.lineno}:{error.colno}: TOML syntax: {reason}") from None
    except UnicodeDecodeError as error:
        raise BridgeError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BridgeError(f"{path} cannot be read as TOML: {error}") from None
    except FileNotFoundError:
        raise BridgeError(f"{path} does not exist; give a TOML file that does") from None
    except OSError as error:
        raise BridgeError(f"{path} cannot be read: {error.strerror}") from None


def fields_of(schema: Any) -> dict[str, Any] | None:
    """Field name -> resolved type (None left out of it) of a config class; None where `schema` is not one."""
    if not dataclasses.is_dataclass(schema):
        return None
    hints = typing.get_type_hints(schema, include_extras=False)
    return {field.name: _without_none(hints[field.name]) for field in dataclasses.fields(schema)}


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        arguments = [argument for argument in typing.get_args(hint) if argument is not type(None)]
        return arguments[0] if len(arguments) == 1 else hint
    return hint


def known_keys(schema: Any, values: Mapping[str, Any]) -> int:
    """How many values are where the schema has one: a table where it has a value, or the reverse, is not."""
    fields, count = fields_of(schema) or {}, 0
    for key, value in values.items():
        if key not in fields:
            continue
        if fields_of(fields[key]) is not None:
            count += known_keys(fields[key], value) if isinstance(value, Mapping) else 0
        else:
            count += not isinstance(value, Mapping) or typing.get_origin(fields[key]) is dict
    return count


def _underscored(schema: Any, values: dict[str, Any], source: str) -> dict[str, Any]:
    """The values with the options in their table [vllm] spelled with underscores."""
    options = values.get("vllm")
    if not isinstance(options, dict) or "vllm" not in (fields_of(schema) or ()):
        return values
    found: dict[str, Any] = {}
    for key, value in options.items():
        name = key.replace("-", "_")
        if name in found:
            raise BridgeError(
                f"{source}: vllm.{name} is given twice, with dashes and with underscores; give one"
            )
        found[name] = value
    return {**values, "vllm": found}


def _merged(old: Any, new: Any) -> Any:
    """`new`, with what `old` says beside it where both are tables."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def _check_keys(schema: Any, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
    fields = fields_of(schema)
    if fields is None:
        return
    for key, value in values.items():
        if key not in fields:
            raise BridgeError(_unknown_key(f"{source}: unknown key {prefix}{key}", key, fields, prefix))
        if isinstance(value, Mapping):
            _check_keys(fields[key], value, source, f"{prefix}{key}.")


def _check_kind(schema: Any, values: Mapping[str, Any], file: str, others: Mapping[str, type[Any]]) -> None:
    keys, here = set(values), set(fields_of(schema) or ())
    for command, other in others.items():
        if keys - here and keys <= set(fields_of(other) or ()):
            odd = ", ".join(sorted(keys - here))
            raise BridgeError(
                f"{file} is a file for `{command}`, by its keys {odd}; allowed here: {', '.join(sorted(here))}"
            )


def _unknown_key(what: str, key: str, fields: Mapping[str, Any], prefix: str) -> str:
    table = f"[{prefix[:-1]}]" if prefix else "the top level"
    return f"{what}; {did_you_mean(key, fields, prefix)}allowed in {table}: {', '.join(sorted(fields))}"


def _put(schema: Any, values: dict[str, Any], key: str, value: Any, source: str) -> None:
    *tables, last = key.split(".")
    nested: dict[str, Any] = {last: value}
    for table in reversed(tables):
        nested = {table: nested}
    _check_keys(schema, nested, source)
    place = values
    for table in tables:
        place = place.setdefault(table, {})
        if not isinstance(place, dict):
            raise BridgeError(f"{source}: {table} is a value, not a table; allowed: a key of a table")
    place[last] = value


def walk(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables; an empty one is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from walk(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _leaves(config: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        elif isinstance(value, Mapping) and value:
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, _plain(value)


def _plain(value: Any) -> Any:
    """A list of config classes as tables, without what is not set."""
    if dataclasses.is_dataclass(value):
        return {name: _plain(each) for name, each in vars(value).items() if each is not None}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


_WANTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "dataclass_type": "a table",
    "too_short": "a list that is not empty",
    "string_too_short": "a text that is not empty",
}


def _explain(error: ValidationError, origin: Mapping[str, str], source: str) -> str:
    """One line for pydantic's first error: where, key, what was given, what is allowed."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{source}: the key {key} is missing; it is required"
    if first["type"] in (
        "unexpected_keyword_argument",
        "extra_forbidden",
    ):  # in a list, where `_check_keys` does not look
        return f"{source}: unknown key {key}"
    if first["type"] == "value_error":  # a rule of ours over several keys: its message says it all
        sources = [place for name, place in origin.items() if name.startswith(f"{key}." if key else "")]
        return f"{', '.join(dict.fromkeys(sources)) or source}: {first['ctx']['error']}"
    given = f"{first['input']!r} ({type(first['input']).__name__})"
    wanted = _WANTED.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    return f"{origin.get(key, source)}: {key} = {given} is not allowed; it must be {wanted}"
