"""What travels as `init_info` and `update_info` in vLLM's calls, checked before anything is done about it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from titan_bridge.errors import BridgeError
from titan_bridge.transfer.lanes import BUCKET_BYTES
from titan_bridge.transfer.transport import Backend

VERSION = 1
"""Of the notes and messages."""

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Text = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=1)]
_Port = Annotated[int, Field(ge=1, le=65535)]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Terms:
    """`init_info`: what trainer and workers agree on; the trainer says it."""

    host: _Text
    """Address of trainer rank 0, as the workers reach it."""
    port: _Port
    trainer: _Text
    """Made up anew by every start of a trainer."""
    epoch: int
    """Counts the connections of this trainer: one is made anew after a fault."""
    trainers: _Count
    engine: Annotated[int, Field(ge=0)] = 0
    """Which of several engines this is; the client says so."""
    engines: _Count = 1
    workers: _Count | None = None
    """Workers of each engine, if they cannot know (dense data parallelism)."""
    seconds: Annotated[float, Field(gt=0, le=86400)] = 300.0
    """Time limit of connecting and of one update."""
    bucket_bytes: _Count = BUCKET_BYTES
    backend: Backend = "gloo"
    version: int = VERSION

    @property
    def prefix(self) -> str:
        return f"{self.trainer}/{self.epoch}"

    def hello(self, engine: int, index: int) -> str:
        return f"{self.prefix}/hello/{engine}.{index}"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Update:
    """`update_info`: one update."""

    host: _Text
    """Of the trainer's board, as `port`."""
    port: _Port
    trainer: _Text
    epoch: int
    round: int
    """Counts the updates of this trainer."""
    first: _Count
    """The group's rank of the first worker."""
    version: str
    """Name of the weights after it."""
    base: str | None
    """Version that the engine must have; None: any."""
    kind: Literal["dense", "sparse"]


def parsed(kind: type[T], name: str, given: Any) -> T:
    """A checked `Terms` or `Update` from what came in a call; `name` is the call's argument.

    Raises:
        BridgeError: Not a mapping, or its first key that is missing, unknown, or has a wrong value.
    """
    if not isinstance(given, Mapping):
        raise BridgeError(f"{name} is {reprlib.repr(given)}; it must be a table")
    try:
        return kind(**{str(key): value for key, value in given.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key, value = reprlib.repr(str(first["loc"][0]))[1:-1], reprlib.repr(first["input"])
    known = ", ".join(field.name for field in fields(kind))  # type: ignore[arg-type]
    if first["type"] == "unexpected_keyword_argument":
        raise BridgeError(f"{name} has an unknown key {key}; allowed: {known}")
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        raise BridgeError(f"{name} lacks the key {key}; it must have what a titan_bridge trainer sends")
    raise BridgeError(f"{name}.{key} is {value}; {first['msg'].replace('Input should', 'it must')}")
