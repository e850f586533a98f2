"""What a user says to a trainer rank, and what an update says back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from titan_bridge.errors import BridgeError
from titan_bridge.transfer.protocol import BUCKET_BYTES, PauseMode

OnDead = Literal["raise", "drop"]
Transport = Literal["auto", "tcp", "memory", "gloo", "nccl"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a trainer connects and sends; the same on all ranks, except `host`."""

    host: str | None = None
    """Address of this rank that the workers and the other ranks reach; None: the one from which this host reaches the
    first engine, or 127.0.0.1 for one in this process."""
    port: int = 0
    """Rank r listens at port + r; 0 takes free ones."""
    seconds: float = 300.0
    """Time limit of each step of an update that waits for others: see `protocol`."""
    bucket_bytes: int = BUCKET_BYTES
    """Most bytes of one message; a rank packs two at a time for each engine."""
    delta: bool = True
    """Keep a copy of what the engines have, in their dtypes, and send only what differs where that is less."""
    pause: PauseMode = "keep"
    """What requests in flight do while an update becomes live: "abort", "wait" and "keep" as in vLLM, which computes
    anew what those that go on have cached; with "keep_cache" they go on at once with what they have cached, of the
    weights before, and later requests share none of it."""
    transport: Transport = "auto"
    """What tensors travel over; see `transports`. "auto": memory that trainer rank and worker share, where they do;
    from GPU to GPU nccl; else tcp."""
    on_dead: OnDead = "raise"
    """What an engine that is lost in an update does: fail the update for all, or leave `Trainer.engines`."""

    def __post_init__(self) -> None:
        for name, kind in (("pause", PauseMode), ("transport", Transport), ("on_dead", OnDead)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise BridgeError(f"Options.{name} is {value!r}; allowed: {', '.join(get_args(kind))}")
        if self.host in ("0.0.0.0", "::"):
            raise BridgeError(
                f"Options.host is {self.host!r}, which nobody can reach; give this host's own address"
            )
        for name in ("seconds", "bucket_bytes"):
            if not (value := getattr(self, name)) > 0:
                raise BridgeError(f"Options.{name} is {value!r}; it must be more than 0")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one update did; the same on every trainer rank, but for `seconds`."""

    version: str
    """Name of the weights that are live now."""
    before: Mapping[str, str]
    """The version that each engine had, by engine."""
    kind: Literal["whole", "delta"]
    """All weights, or, wherever that was less, what changed."""
    seconds: float
    """From the call to the weights being live."""
    sent: Sequence[Mapping[str, int]]
    """`sent[rank][worker]`: bytes from each trainer rank to each worker, which is called "engine/number"."""
    received: Mapping[str, int]
    """Bytes that each worker received."""
    lower_bound: int
    """Bytes that an update of all weights needs at least, over all workers."""
    phases: Mapping[str, float]
    """Seconds from the start of the update on rank 0 to the end of each phase: "prepared", "received", "live"."""
    pause: float
    """Longest that an engine took for its commit: generation stood still for less than this."""
    unused: Sequence[str]
    """Tensors of the trainer that no engine has, a value head for instance."""
    dropped: Mapping[str, str]
    """Engines that were lost in this update and left out, and why."""
