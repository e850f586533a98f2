"""What an engine with attention groups is started with, and what it refuses, before any worker starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from titan_bridge.engine.attention_dp.executor import GroupExecutor
from titan_bridge.engine.log import logger_of
from titan_bridge.engine.model.build import Setup
from titan_bridge.engine.options import titan_options
from titan_bridge.errors import refuse

SCHEDULER = "titan_bridge.engine.attention_dp.scheduler.GroupScheduler"
WORKER = "titan_bridge.engine.attention_dp.worker.GroupWorker"

logger = logger_of(__name__)


def use_groups(vllm_config: VllmConfig, setup: Setup) -> None:
    """Let vLLM make our scheduler, executor and workers, where `setup` has more than one group.

    Raises:
        BridgeError: an option that does not go with it.
    """
    groups = setup.split.groups
    if groups == 1:
        if titan_options(vllm_config.additional_config).attention_dp is True:
            logger.warning("attention_dp makes one group here, which is none: tp copies no key-value heads")
        return
    refuse(_unsupported(vllm_config, setup), f"with attention_dp={groups}")
    given: Any = vllm_config.additional_config
    titan = {**(given.get("titan") or {}), "attention_dp": groups}
    # A number from here on, in all processes; the shorthand, if that was used, is taken out.
    vllm_config.additional_config = {
        **{key: value for key, value in given.items() if key != "sharding"},
        "titan": titan,
    }
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    vllm_config.parallel_config.worker_cls = WORKER
    vllm_config.parallel_config.distributed_executor_backend = GroupExecutor
    if vllm_config.scheduler_config.async_scheduling is not False:
        logger.warning(
            "Asynchronous scheduling is off with attention groups: the device waits while the next step is scheduled, "
            "which costs most where steps are short (small models, few requests)"
        )
        vllm_config.scheduler_config.async_scheduling = False
    if not vllm_config.model_config.enforce_eager:
        logger.warning(
            "Attention groups run eagerly, without compiled steps and CUDA graphs, since groups have different numbers "
            "of tokens: each step launches its kernels one by one, which costs most in decoding small batches"
        )
        vllm_config.model_config.enforce_eager = True


def _unsupported(vllm_config: VllmConfig, setup: Setup) -> Iterator[tuple[object, str, str]]:
    """Whether it is asked for, what it is ("LoRA is"), and what to do instead."""
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    stages = parallel.pipeline_parallel_size
    yield stages > 1, f"pipeline_parallel_size={stages} is", "leave one of them out"
    yield setup.sharded, "dense = 'shard' is", "leave one of them out"
    yield (
        vllm_config.lora_config,
        "LoRA is",
        "leave enable_lora off, or merge it: `titan-bridge reshard --merge-lora`",
    )
    yield vllm_config.speculative_config, "speculation is", "leave speculative_config out"
    yield vllm_config.kv_transfer_config, "a KV connector is", "leave kv_transfer_config out"
    offload = vllm_config.cache_config.kv_offloading_size
    yield offload is not None, f"kv_offloading_size={offload} is", "leave it out"
    yield vllm_config.ec_transfer_config, "an encoder-cache connector is", "leave ec_transfer_config out"
    events = vllm_config.kv_events_config
    yield events and events.enable_kv_cache_events, "KV cache events are", "leave kv_events_config out"
    runner = vllm_config.model_config.runner_type
    yield runner != "generate", f"runner={runner!r} is", "allowed: runner='generate'"
    backend = parallel.distributed_executor_backend
    executor = f"distributed_executor_backend={backend!r} is"
    yield backend not in (None, "mp", "uni", GroupExecutor), executor, "allowed: 'mp', 'uni'"
    yield parallel.nnodes > 1, f"nnodes={parallel.nnodes} is", "allowed: 1"
    platform = current_platform.device_type
    yield platform not in ("cpu", "cuda"), f"device {platform!r} is", "allowed: CPUs, CUDA and ROCm devices"
    worker = parallel.worker_cls
    yield worker not in ("auto", WORKER), f"worker_cls={worker!r} is", "leave it out"
    scheduled = scheduler.scheduler_cls
    yield scheduled not in (None, SCHEDULER), f"scheduler_cls={scheduled!r} is", "leave it out"
    routed = vllm_config.aux_output_config.enable_return_routed_experts
    yield routed, "enable_return_routed_experts is", "leave it off"
