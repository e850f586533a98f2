"""Qwen3: attention and dense feed-forward over tp; routed experts over ep, or over tp where ep is 1."""

from __future__ import annotations

from torchtitan.models.qwen3.model import Qwen3Model
from torchtitan.models.qwen3.sharding import set_qwen3_sharding_config

from titan_bridge.parallelize import routed_experts_placement


def set_sharding(config: Qwen3Model.Config, *, enable_ep: bool) -> None:
    """Fill ``sharding_config`` in place with TorchTitan's own declarations, without sequence parallelism."""
    set_qwen3_sharding_config(config, enable_sp=False, enable_ep=enable_ep)


shard_placement_fn = routed_experts_placement
