"""How weights get from trainer ranks into engines: the whole protocol.

    who                 what                                             ends, at the latest, after
    ------------------------------------------------------------------------------------------------------------------
 1  HANDSHAKE           once for each engine, and again after a fault
    coordinator -> RPC  init_weight_transfer_engine(Terms): where the    CONNECT_SECONDS for a worker, `seconds` for all
                        trainer ranks listen, and the run's secret
    worker -> rank 0    control connection (both prove the secret), then
                        its layout, version, base
    rank 0 -> worker    "join": both layouts. Both ends make the same    `seconds`
                        plan and cut it into the same messages
    worker -> rank n    a data connection to each rank that sends to it
 2  PREPARE             every worker: are live weights still what the    `seconds`, and again for the memory
                        plan was made for? is the base of a delta what
                        is live? is there memory? It answers, or refuses
 3  SEND                every trainer rank, to all its workers at once:  `seconds` for 3 and 4 together
                        all planned messages, or only what changed in
                        them; the first time, the two agree on what
                        tensors travel over (`transports`). A thread
                        of the worker receives into the host's memory;
                        its engine goes on serving
 4  VOTE                worker -> rank 0: "I have everything", or why not.
                        Other ranks -> rank 0: the same of sending.
                        One "no" ends the update here
 5  COMMIT              only after every "yes", through the engine:      `seconds`
    coordinator -> RPC  start_weight_update, update_weights(Update; its
                        token is the decision), finish_weight_update.
                        Inside finish the engine pauses, the workers of
                        the engine vote once more (all-reduce of MIN over
                        the engine's own group; "no" to a delta whose base
                        is not live any more), write their live weights,
                        drop cached prefixes, take the version, and go on
 6  ACKNOWLEDGE         rank 0 asks every worker which update is live,   `seconds`
                        whatever became of the RPC; rank 0 -> other
                        ranks: the report, or the error

Trainer rank 0 coordinates. The other ranks hold one connection to it: they say "call n" and what they are about to
send, hear which engines take what, say what they sent, and hear the end. A rank that comes late to call n, when rank 0
has given it up, hears so at once and is in step again for call n+1. Nothing else is shared: no store, no group.

What a fault ends in: before the vote is complete the engine serves the old weights, whoever dies, stalls, or sends
nonsense, and generation is not touched. After it, all workers of an engine take the update or none does; the trainer
may be dead by then. Of several engines one may have taken an update that another did not: the error names those that
have. All ranks raise one TransferError within the time limit of the step (plus MARGIN for each that waits), and the
next update makes new connections. With `on_dead="drop"` an engine that is lost, not one that refuses, is left out
instead: each step has time of its own, so that what one engine used up is not taken from the others.
"""

from __future__ import annotations

import hashlib
import hmac
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from titan_bridge.errors import BridgeError

VERSION = 4  # of the calls and messages
MARGIN = 2.0  # seconds that whoever waits for an answer waits longer, so that it hears the reason
CONNECT_SECONDS = 10.0  # for a worker to reach the trainer while its engine waits
BUCKET_BYTES = 64 * 2**20

KEEP_CACHE = "keep_cache"
PauseMode = Literal["abort", "wait", "keep", "keep_cache"]
"""vLLM's for requests in flight, and "keep_cache": they go on with what they have cached, of the old weights."""

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Text = Annotated[str, Field(min_length=1, max_length=1024)]
_Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=1)]
_Address = Annotated[str, Field(pattern=r"^.{1,255}:[0-9]{1,5}$")]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Terms:
    """`init_info`: what a worker needs to meet a trainer."""

    trainers: Annotated[list[_Address], Field(min_length=1)]  # "host:port" of each, as workers reach it
    secret: _Hex  # drawn by each start of a trainer; whoever does not know it is not heard
    run: _Text  # names this start of the trainer
    link: _Text  # names this connection: one is made anew after a fault
    seconds: Annotated[float, Field(gt=0, le=86400)] = 300.0  # time limit of each step
    adapter: _Text | None = None  # name of the engine's LoRA adapter that is updated, instead of the weights
    scaling: Annotated[float, Field(gt=0)] | None = None  # of its products; None: as the engine has loaded it
    bucket_bytes: _Count = BUCKET_BYTES  # most bytes of one message
    version: int = VERSION


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Update:
    """`update_info`: the decision that an update which every worker has is to be taken."""

    link: _Text
    number: _Count  # counts the updates of this trainer
    version: str  # name of the weights after it
    pause: PauseMode = "keep"  # what becomes of requests in flight while the weights are written
    token: _Hex  # see `token_of`


def token_of(secret: str, link: str, number: int, version: str) -> str:
    """Proves that the trainer decided this: without the secret nobody can make a worker take anything."""
    return hmac.new(bytes.fromhex(secret), repr((link, number, version)).encode(), hashlib.sha256).hexdigest()


def base_of(run: str, number: int) -> str:
    """Names exactly the weights that update `number` of a trainer left: what a delta is a delta of."""
    return f"{run}/{number}"


def parsed(kind: type[T], name: str, given: Any) -> T:
    """A checked `Terms` or `Update` from a call's argument `name`. BridgeError names the first key that is wrong."""
    if not isinstance(given, Mapping):
        raise BridgeError(f"{name} is {reprlib.repr(given)}; it must be a table")
    try:
        return kind(**{str(key): value for key, value in given.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key, value = reprlib.repr(str(first["loc"][0]))[1:-1], reprlib.repr(first["input"])
    if first["type"] == "unexpected_keyword_argument":
        known = ", ".join(field.name for field in fields(kind))  # type: ignore[arg-type]
        raise BridgeError(f"{name} has an unknown key {key}; allowed: {known}")
    if first["type"].startswith("missing"):
        raise BridgeError(f"{name} lacks the key {key}; it must have what a titan_bridge trainer sends")
    if key == "secret":
        value = "something else"  # errors are logged
    raise BridgeError(f"{name}.{key} is {value}; {first['msg'].replace('Input should', 'it must')}")
