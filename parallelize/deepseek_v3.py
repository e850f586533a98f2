"""DeepSeek-V3: heads and dense feed-forward over tp, latents whole; routed experts over ep, or over tp."""

from __future__ import annotations

from torchtitan.models.deepseek_v3.model import DeepSeekV3Model
from torchtitan.models.deepseek_v3.sharding import set_deepseek_v3_sharding_config

from titan_bridge.parallelize import routed_experts_placement


def set_sharding(config: DeepSeekV3Model.Config, *, enable_ep: bool) -> None:
    """Fill ``sharding_config`` in place with TorchTitan's own declarations, without sequence parallelism."""
    set_deepseek_v3_sharding_config(config, enable_sp=False, enable_ep=enable_ep)


shard_placement_fn = routed_experts_placement
