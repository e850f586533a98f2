"""What a user says to a trainer rank, and what an update says back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from titan_bridge.transfer.lanes import BUCKET_BYTES
from titan_bridge.transfer.transport import Backend

PauseMode = Literal["abort", "wait", "keep"]


class Client(Protocol):
    """vLLM's `VLLMWeightSyncClient`; any other method of an engine is used if the client has it: `engines`,
    `is_paused()`, `pause_generation(mode)`, `resume_generation()`, `reset_prefix_cache()`,
    `update_weight_version(version)`."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a trainer connects and sends."""

    host: str = "127.0.0.1"
    """Address of trainer rank 0 that the other trainer ranks and all workers reach."""
    port: int = 0
    """Of the board; 0 takes a free one, which only rank 0 then knows: for trainers of one rank."""
    seconds: float = 300.0
    """Time limit of a connection and of an update."""
    bucket_bytes: int = BUCKET_BYTES
    """Most bytes of one message; a sender holds two."""
    backend: Backend = "gloo"
    """Transport of the weights: "gloo" through the hosts' memory, "nccl" between GPUs."""
    workers: int | None = None
    """Workers of each engine where these cannot know: dense models with vLLM's data parallelism."""
    pause: PauseMode | None = "keep"
    """vLLM's pause mode for requests in flight while an update becomes live, if the client can pause; None: do not."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one update did; the same on every trainer rank, but for `seconds`."""

    version: str
    """Name of the weights that are live now."""
    kind: Literal["dense", "sparse"]
    """All weights, or what changed."""
    seconds: float
    """From the call to the weights being live."""
    sent: Sequence[Sequence[int]]
    """`sent[rank][worker]`: bytes from each trainer rank to each worker."""
    received: Mapping[int, int]
    """Bytes that each worker received, by worker (0, 1, ...)."""
    lower_bound: int
    """Bytes that a dense update needs at least, over all workers; 0 for a sparse one."""
    phases: Mapping[str, float]
    """Seconds from the start of the update on rank 0 to the end of each phase: "ready", "received", "live"."""
