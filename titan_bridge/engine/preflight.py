"""What can be refused before any worker starts, in the process the user talks to."""

from __future__ import annotations

from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from titan_bridge.checkpoint.model_dir import LOAD_FORMAT, check_weights, weights_directory
from titan_bridge.checks import experts_in, model_fits
from titan_bridge.engine.build import Plan, captures_experts, model_config, plan_from
from titan_bridge.engine.head_dims import check_head_dim
from titan_bridge.errors import BridgeError
from titan_bridge.layout import layout

logger = init_logger(f"vllm.{__name__}")  # under vLLM's logger, whose handlers and level it shares


def check(vllm_config: VllmConfig) -> None:
    """Check model, sizes and options of a `VllmConfig` that asks for torchtitan.

    vLLM calls it through its per-architecture configuration hooks (`patches.check_config_early`).

    Raises:
        BridgeError: One line that names the field, the value given and what is allowed.
    """
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise BridgeError(
            f"pipeline_parallel_size={parallel.pipeline_parallel_size} is not supported with "
            "model_impl='torchtitan'; allowed: 1"
        )
    if parallel.enable_eplb:
        raise BridgeError(
            "expert load balancing is not supported with model_impl='torchtitan'; leave enable_eplb off"
        )
    if vllm_config.lora_config is not None:
        raise BridgeError("LoRA is not supported with model_impl='torchtitan'; leave enable_lora off")
    if vllm_config.quant_config is not None or vllm_config.model_config.quantization is not None:
        raise BridgeError(
            f"quantization={vllm_config.model_config.quantization} is not supported with "
            "model_impl='torchtitan'; leave it out"
        )
    model = vllm_config.model_config
    if model.enable_prompt_embeds:
        raise BridgeError(
            "prompt embeddings are not supported with model_impl='torchtitan'; leave enable_prompt_embeds off"
        )
    plan = plan_from(vllm_config, dp=parallel.data_parallel_size if model.is_moe else 1)
    if parallel.enable_expert_parallel and not experts_in(plan.hf):
        raise BridgeError(f"enable_expert_parallel is set, but {model.model} has no experts; leave it out")
    model_fits(plan.hf, plan.sizes, max_model_len=plan.max_model_len)
    check_head_dim(plan.hf)
    captures = captures_experts(plan, model.dtype, current_platform.get_device_capability())
    limit_graphs(vllm_config.compilation_config, plan, captures=captures)
    load = vllm_config.load_config
    if load.load_format not in ("auto", LOAD_FORMAT):
        return
    directory = weights_directory(model.model, plan.options.step)
    if directory is None:
        if load.load_format == LOAD_FORMAT or plan.options.step is not None:
            raise BridgeError(f"{model.model} holds no checkpoint that load_format={LOAD_FORMAT!r} reads")
        return
    load.load_format = LOAD_FORMAT
    buffers = plan.buffers(layout(model_config(plan), plan.sizes))
    check_weights(directory, plan.family, plan.hf, buffers)


def limit_graphs(compilation: CompilationConfig, plan: Plan, *, captures: bool) -> None:
    """Leave out of CUDA graphs what they cannot hold; vLLM would find out while it captures.

    Routed experts that ask the host (`captures` is false) stand between two graphs. Dense weights that are gathered
    layer by layer come in hooks, which no graph replays.
    """
    asked: CUDAGraphMode | None = compilation.cudagraph_mode  # None: vLLM decides later, for full graphs
    if plan.sharded:
        allowed, why = CUDAGraphMode.NONE, "additional_config.titan.dense = 'shard' gathers weights in hooks"
    elif experts_in(plan.hf) and not captures and (asked is None or asked.has_full_cudagraphs()):
        allowed, why = CUDAGraphMode.PIECEWISE, "routed experts ask the host how many tokens they get"
    else:
        return
    if asked is not None and asked != allowed:
        logger.warning("cudagraph_mode %s becomes %s: %s", asked.name, allowed.name, why)
    compilation.cudagraph_mode = allowed
