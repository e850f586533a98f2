"""Attention of windowed layers on CPUs, where they share a KV cache group with layers that see everything."""

from __future__ import annotations

import os
from collections.abc import Collection

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from titan_bridge.engine.log import logger_of

SPLIT = "VLLM_CPU_ATTN_SPLIT_KV"

logger = logger_of(__name__)


def keep_keys_together(vllm_config: VllmConfig, windows: Collection[int | None]) -> None:
    """Set `SPLIT` to 0, in this worker, where splitting a request's keys over threads would give wrong numbers.

    vLLM divides the work once for a group, without a window if its layers' differ; a part that lies outside of a
    layer's window is then added to the result although nothing was computed for it. Groups are that mixed without
    vLLM's hybrid cache manager, which most KV connectors turn off. vllm 0.32 (`CPUAttentionMetadataBuilder.build`).

    Args:
        windows: of the layers of this worker, in tokens; None for a layer that sees everything.
    """
    mixed = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager and len(set(windows)) > 1
    if mixed and current_platform.is_cpu():
        os.environ[SPLIT] = "0"
        logger.info("%s=0: layers with and without a window share a KV cache group", SPLIT)
