"""What can be refused before any worker starts, in the process the user talks to."""

from __future__ import annotations

from collections.abc import Iterator

from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig
from vllm.platforms import current_platform

from titan_bridge.checkpoint.model_dir import LOAD_FORMAT, check_weights, weights_directory
from titan_bridge.checks import experts_in, model_fits
from titan_bridge.engine.attention_dp.checks import use_groups
from titan_bridge.engine.cpu.head_dims import check_head_dim
from titan_bridge.engine.log import logger_of
from titan_bridge.engine.model.backends import check_backend
from titan_bridge.engine.model.build import Setup, captures_experts, setup_from
from titan_bridge.engine.options import titan_options
from titan_bridge.errors import BridgeError, refuse
from titan_bridge.model_layout import layout
from titan_bridge.models.adapters import inner_attention

SPECULATION = ("draft_model", "ngram", "ngram_gpu", "suffix")
"""Methods that need no more of the served model than its logits."""

RUNNERS = (("generate", "none"), ("pooling", "embed"))
"""vLLM's runner and the conversion of a causal model: embeddings, and scores from them, need no further weights."""

logger = logger_of(__name__)


def check(vllm_config: VllmConfig) -> None:
    """Check model, sizes and options of a `VllmConfig` that asks for torchtitan.

    vLLM calls it through its per-architecture configuration hooks (`patches.check_config_early`).

    Raises:
        BridgeError: One line that names the field, the value given and what is allowed.
    """
    refuse(_unsupported(vllm_config), "with model_impl='torchtitan'")
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    setup = setup_from(vllm_config, dp=parallel.data_parallel_size if model.is_moe else 1)
    if (setup.options.ep or 1) > 1 and not parallel.enable_expert_parallel:
        raise BridgeError(
            f"additional_config.titan.ep={setup.options.ep} needs enable_expert_parallel; set both, or leave ep out"
        )
    if parallel.enable_expert_parallel and not experts_in(setup.hf):
        raise BridgeError(f"enable_expert_parallel is set, but {model.model} has no experts; leave it out")
    model_fits(setup.hf, setup.sizes, max_model_len=setup.max_model_len)
    for remark in setup.split.remarks:
        logger.warning("%s", remark)
    if (backend := vllm_config.attention_config.backend) is not None:
        check_backend(backend.name, setup.split)
    if setup.options.mla == "latent" and not model.use_mla:
        raise BridgeError("additional_config.titan.mla = 'latent' needs attention with latents")
    if model.use_mla and setup.sharded:
        raise BridgeError(
            "a cache of latents (additional_config.titan.mla) derives matrices from whole weights, and dense = 'shard' "
            "keeps parts; set mla = 'expanded'"
        )
    if setup.sharded and any(inner_attention(layer.attention).sinks for layer in setup.config.layers):
        raise BridgeError(
            "additional_config.titan.dense = 'shard' is not supported with the attention sinks of "
            f"{setup.family.name}, of which vLLM's attention needs all; leave it out"
        )
    check_head_dim(setup.hf, latent=model.use_mla)
    use_groups(vllm_config, setup)
    captures = captures_experts(setup, model.dtype, current_platform.get_device_capability())
    limit_graphs(vllm_config.compilation_config, setup, captures=captures)
    load = vllm_config.load_config
    if load.load_format in ("sharded_state", "runai_streamer_sharded", "tensorizer"):
        raise BridgeError(
            f"load_format={load.load_format!r} is not supported with model_impl='torchtitan'; leave it out: each "
            "rank reads only its own slices of safetensors and of a DCP"
        )
    if load.load_format not in ("auto", LOAD_FORMAT):
        return
    directory = weights_directory(model.model, setup.options.step)
    if directory is None:
        if load.load_format == LOAD_FORMAT or setup.options.step is not None:
            raise BridgeError(f"{model.model} holds no checkpoint that load_format={LOAD_FORMAT!r} reads")
        return
    load.load_format = LOAD_FORMAT
    buffers = setup.buffers(layout(setup.config, setup.sizes, policy=None))
    check_weights(directory, setup.family, setup.hf, buffers, setup.options.names)


def _unsupported(vllm_config: VllmConfig) -> Iterator[tuple[object, str, str]]:
    """Whether it is asked for, what it is ("LoRA is"), and what to do instead; for each option that we lack."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    sharded = titan_options(vllm_config.additional_config).shards(parallel.data_parallel_size)
    stages = parallel.pipeline_parallel_size
    what = f"additional_config.titan.dense = 'shard' with pipeline_parallel_size={stages} is"
    yield sharded and stages > 1, what, "leave one of them out"
    # With either, vLLM spreads the tokens of a sequence over ranks, which nothing here adds up.
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        yield (size := getattr(parallel, name)) > 1, f"{name}={size} is", "allowed: 1"
    yield parallel.enable_eplb, "expert load balancing is", "leave enable_eplb off"
    yield parallel.use_ubatching, "microbatches (enable_dbo) are", "leave enable_dbo and ubatch_size out"
    if (lora := vllm_config.lora_config) is not None:
        yield sharded, "LoRA with additional_config.titan.dense = 'shard' is", "leave one of them out"
        for name in ("fully_sharded_loras", "enable_mixed_moe_lora_format", "enable_moe_shared_loras"):
            yield getattr(lora, name), f"{name} is", "leave it off"
    quantization = model.quantization or vllm_config.quant_config
    yield quantization, f"quantization={quantization} is", "leave it out"
    yield model.enable_prompt_embeds, "prompt embeddings are", "leave enable_prompt_embeds off"
    offload = vllm_config.offload_config
    for name, value in (
        ("cpu_offload_gb", offload.uva.cpu_offload_gb),
        ("offload_group_size", offload.prefetch.offload_group_size),
    ):
        yield value, f"{name}={value} is", "leave it out"
    # A head for classes would be left without its weights.
    runner = f"runner={model.runner_type!r} (convert={model.convert_type!r}) is"
    allowed = "allowed: runner='generate', or 'pooling' with convert='embed'"
    yield (model.runner_type, model.convert_type) not in RUNNERS, runner, allowed
    method = getattr(vllm_config.speculative_config, "method", None)
    # vLLM makes what drafts on the last stage alone, and asks the others for it; of a draft model it builds one stage.
    drafts = f"speculation (method {method!r}) with pipeline_parallel_size={stages} is"
    yield method and stages > 1, drafts, "leave one of them out"
    methods = ", ".join(map(repr, SPECULATION))
    yield method not in (None, *SPECULATION), f"speculative method {method!r} is", f"allowed: {methods}"


def limit_graphs(compilation: CompilationConfig, setup: Setup, *, captures: bool) -> None:
    """Leave out of CUDA graphs what they cannot hold; vLLM would find out while it captures.

    Routed experts that ask the host (`captures` is false) stand between two graphs. Dense weights that are gathered
    layer by layer come in hooks, which no graph replays.
    """
    asked: CUDAGraphMode | None = compilation.cudagraph_mode  # None: vLLM decides later, for full graphs
    if setup.sharded:
        allowed, why = CUDAGraphMode.NONE, "additional_config.titan.dense = 'shard' gathers weights in hooks"
    elif experts_in(setup.hf) and not captures and (asked is None or asked.has_full_cudagraphs()):
        allowed, why = CUDAGraphMode.PIECEWISE, "routed experts ask the host how many tokens they get"
    else:
        return
    if asked is not None and asked != allowed:
        logger.warning("cudagraph_mode %s becomes %s: %s", asked.name, allowed.name, why)
    compilation.cudagraph_mode = allowed
