"""Qwen3: attention and dense feed-forward over tp; routed experts over ep, or over tp where ep is 1."""

from __future__ import annotations

from collections.abc import Sequence

from torchtitan.models.qwen3.model import Qwen3Model
from torchtitan.models.qwen3.sharding import set_qwen3_sharding_config

from titan_bridge.mesh import ShardPlacement, Sizes

_ROUTED_EXPERTS = (".w1_EFD", ".w2_EDF", ".w3_EFD")


def set_sharding(config: Qwen3Model.Config, *, enable_ep: bool) -> None:
    """Fill ``sharding_config`` in place with TorchTitan's own declarations, without sequence parallelism."""
    set_qwen3_sharding_config(config, enable_sp=False, enable_ep=enable_ep)


def shard_placement_fn(fqn: str, shape: Sequence[int], sizes: Sizes) -> ShardPlacement:
    """Routed experts (global ``shape``, experts first) go to the sparse mesh where ep > 1; all else is dense.

    FSDP shards dim 0, but dim 1 of experts that are fewer than the ranks to shard them over, as in
    ``torchtitan/distributed/fsdp.py`` (which counts replicas in when ep is 1).
    """
    if not fqn.endswith(_ROUTED_EXPERTS):
        return ShardPlacement(mesh="dense")
    if sizes.ep > 1:
        return ShardPlacement(mesh="sparse", dim=1 if sizes.efsdp * sizes.ep > shape[0] else 0)
    return ShardPlacement(mesh="dense", dim=1 if sizes.dp_replicate * sizes.fsdp > shape[0] else 0)
