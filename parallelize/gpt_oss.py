"""gpt-oss: heads and their sinks over tp; routed experts with their biases over ep, or over tp where ep is 1."""

from __future__ import annotations

from torchtitan.models.gpt_oss.model import GptOssModel
from torchtitan.models.gpt_oss.sharding import set_gpt_oss_sharding_config

from titan_bridge.parallelize import routed_experts_placement


def set_sharding(config: GptOssModel.Config, *, enable_ep: bool) -> None:
    """Fill ``sharding_config`` in place with TorchTitan's own declarations, without sequence parallelism."""
    set_gpt_oss_sharding_config(config, enable_sp=False, enable_ep=enable_ep)


shard_placement_fn = routed_experts_placement
