"""Llama 3: attention and feed-forward over tp, no sequence parallelism, everything else replicated."""

from __future__ import annotations

from collections.abc import Sequence

from torchtitan.models.llama3.model import Llama3Model
from torchtitan.models.llama3.sharding import set_llama3_sharding_config

from titan_bridge.mesh import ShardPlacement, Sizes


def set_sharding(config: Llama3Model.Config, *, enable_ep: bool) -> None:
    """Fill ``sharding_config`` in place with TorchTitan's own declarations; there are no experts."""
    set_llama3_sharding_config(config, enable_sp=False)


def shard_placement_fn(fqn: str, shape: Sequence[int], sizes: Sizes) -> ShardPlacement:
    """Every parameter is dense, and FSDP shards its first dim."""
    return ShardPlacement(mesh="dense")
