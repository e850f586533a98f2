"""Builds the served model on one worker: TorchTitan's config tree in, live local shards out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.moe import MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.rope import RoPE
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher
from torchtitan.protocols.module import Module
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from titan_bridge.checkpoint.model_dir import has_expert_bias
from titan_bridge.device import use_cpu_if_no_accelerator
from titan_bridge.device_meshes import get_device_meshes
from titan_bridge.engine.attention_dp.stream import GroupRows, group_attention
from titan_bridge.engine.cpu.eager import has_operators, norm_in_one
from titan_bridge.engine.cpu.packed import use_packed_weights
from titan_bridge.engine.cpu.pages import zeros_like
from titan_bridge.engine.model.attention import PagedAttention, bind_sinks
from titan_bridge.engine.model.backends import check_backend
from titan_bridge.engine.model.feed_forward import join_up
from titan_bridge.engine.model.fsdp import shard_dense
from titan_bridge.engine.model.latent import cache_form, cache_latents
from titan_bridge.engine.model.lora import accept_adapters
from titan_bridge.engine.model.lower import lower, strip
from titan_bridge.engine.model.moe import (
    OwnExpertsDispatcher,
    ServedExperts,
    SpreadDispatcher,
    TopKSumDispatcher,
)
from titan_bridge.engine.model.rope import StepRopes
from titan_bridge.engine.model.router import use_float32_gate
from titan_bridge.engine.model.stages import keep_stage, pass_on, staged
from titan_bridge.engine.model.triton_experts import can_use_triton, use_triton
from titan_bridge.engine.options import TitanOptions, titan_options
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes, check_divides, describe, padded_vocab
from titan_bridge.model_layout import as_layout, specs_of_module
from titan_bridge.models import Family, family_for
from titan_bridge.models.adapters import inner_attention, keep_expert_dtype
from titan_bridge.models.build import build_on_meta, tie
from titan_bridge.models.experts import local, rows_fit
from titan_bridge.parallelize import parallelize
from titan_bridge.policy.layers import Split, split
from titan_bridge.sharding.layout import Layout, ParamLayout
from titan_bridge.sharding.spec import attach_module


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What will be built, decided from configs alone: no weights, no process group."""

    hf: Mapping[str, Any]
    family: Family
    config: Decoder.Config
    """TorchTitan's config tree, as it is served; `build` declares sharding and puts the engine's attention into it."""
    sizes: Sizes
    options: TitanOptions
    padded_vocab: int
    """Rows of the embedding and the head: the vocabulary rounded up to a multiple of tp."""
    max_model_len: int
    split: Split
    """What the policy decided for each layer; `sizes` follow from it."""
    expert_bias: bool = False
    """Whether the model was trained with TorchTitan's load-balancing bias, which routes at inference, too."""

    def buffers(self, layout: Layout) -> dict[str, ParamLayout]:
        """What a checkpoint holds besides the tensors that Hugging Face knows (expert bias), by FQN."""
        known = {view.fqn for view in self.family.views(self.hf, padded_vocab=self.padded_vocab)}
        return {fqn: param for fqn, param in layout.params.items() if fqn not in known}

    @property
    def sharded(self) -> bool:
        """Whether dp ranks keep a part of the dense weights each and gather them layer by layer."""
        return self.options.shards(self.sizes.dp)

    @property
    def spread(self) -> bool:
        """Whether routed experts exchange tokens by all-to-all."""
        return self.sizes.ep > 1 and not (self.sizes.ep == self.sizes.tp and self.sizes.dp == 1)


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model ready for weights."""

    setup: Setup
    model: Decoder
    ropes: StepRopes
    layout: Layout
    """Of the whole model, all pipeline stages."""
    stage: int
    """Of this rank."""
    attention: str
    """Its form and its cache in words."""
    rows: GroupRows | None
    """With attention data parallelism, which rows are of which group."""

    def describe(self) -> str:
        """Meshes, sizes and form of attention in words, for the log."""
        meshes = "".join(f"{name} mesh {mesh}, " for name, mesh in self.layout.meshes.items())
        if self.setup.sizes.pp > 1:
            layers = self.setup.sizes.layers_of(self.stage)
            meshes = f"stage {self.stage} with layers {layers.start} to {layers.stop - 1}, {meshes}"
        return f"{meshes}dense weights {self.setup.options.dense}, {self.attention}"


def setup_from(vllm_config: VllmConfig, *, dp: int) -> Setup:
    """Read vLLM's config; `dp` is the data-parallel size that spans one process group (1 for dense replicas).

    Raises:
        BridgeError: Unsupported model, field, option or size, in one line.
    """
    options = titan_options(vllm_config.additional_config)
    hf = vllm_config.model_config.hf_config.to_dict()
    family = family_for(hf)
    tp = vllm_config.parallel_config.tensor_parallel_size
    expert_parallel = vllm_config.parallel_config.enable_expert_parallel
    stages = vllm_config.parallel_config.pipeline_parallel_size
    sizes = Sizes(dp=dp, tp=tp, pp=stages, dp_outside=stages > 1)
    if expert_parallel and vllm_config.model_config.is_moe:
        sizes = replace(sizes, ep=options.ep or sizes.most_ep)
    rows = padded_vocab(hf["vocab_size"], sizes)
    expert_bias = has_expert_bias(vllm_config.model_config.model, options.step, options.names)
    config = family.model_config(hf, padded_vocab=rows, expert_bias=expert_bias)
    sizes = staged(sizes, len(config.layers))
    decided = split(options.parallelism, family, config, sizes, attention_dp=options.attention_dp)
    setup = Setup(
        hf=hf,
        family=family,
        config=config,
        sizes=decided.sizes,
        split=decided,
        options=options,
        padded_vocab=rows,
        max_model_len=vllm_config.model_config.max_model_len,
        expert_bias=expert_bias,
    )
    _as_served(setup)
    return setup


def _as_served(setup: Setup) -> None:
    """Change what TorchTitan's tree says of training: experts that compute in float32, length, exchange of tokens."""
    keep_expert_dtype(setup.config)
    for _, rope, _, _ in setup.config.traverse(RoPE.Config, recurse=True):
        rope.max_seq_len = setup.max_model_len
    for _, experts, _, _ in setup.config.traverse(RoutedExperts.Config, recurse=True):
        if setup.spread:
            local = experts.token_dispatcher
            experts.token_dispatcher = AllToAllTokenDispatcher.Config(
                num_experts=local.num_experts, top_k=local.top_k
            )


def setup_of_world(vllm_config: VllmConfig, world: int) -> Setup:
    """Of a process group of `world` ranks, as its workers see it.

    Raises:
        BridgeError: as `setup_from`, and for replicas that do not step together, but would have to.
    """
    parallel = vllm_config.parallel_config
    workers = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    replicas = world // workers
    setup = setup_from(vllm_config, dp=replicas)
    if (setup.sharded or setup.spread) and replicas != parallel.data_parallel_size:
        what = "dense = 'shard'" if setup.sharded else "enable_expert_parallel"
        raise BridgeError(
            f"{what} joins all ranks, and {world} of them hold {replicas} replicas of {workers} ranks, but "
            f"data_parallel_size={parallel.data_parallel_size}; allowed: {replicas}, with which they step together"
        )
    return setup


def build(vllm_config: VllmConfig) -> Built:
    """Build this rank's part of the model on the worker's device; weights are uninitialised."""
    use_cpu_if_no_accelerator()
    setup = setup_of_world(vllm_config, dist.get_world_size())
    config, sizes, stage = setup.config, setup.sizes, get_pp_group().rank_in_group
    own = sizes.layers_of(stage) if sizes.stages else range(len(config.layers))
    check_divides(config, sizes, narrows=setup.family.takes_policy)
    latent = vllm_config.model_config.use_mla
    for index in own if not latent else ():  # only these get a KV cache
        layer = config.layers[index]
        computes, tp = inner_attention(layer.attention), sizes.at(f"layers.{index}.attention").tp
        layer.attention.inner_attention = PagedAttention.Config(layer=index, tp=tp, computes=computes)
    rules = setup.family.sharding
    rules.set_sharding(config, enable_ep=sizes.ep > 1)
    model = build_on_meta(config, dtype=vllm_config.model_config.dtype)
    policy = setup.split.policy
    layout = as_layout(
        specs_of_module(model, rules, sizes, setup.options.dense),
        sizes,
        parallelism=policy.to_dict() if policy else None,
    )
    keep_stage(model, sizes, stage)
    # The DTensor backend only carries the layout here: `_localise` takes the local shards out again. TorchTitan's
    # token dispatcher asks at run time which backend is on, so it is set for the whole process.
    set_spmd_backend("partial_dtensor")
    parallelize(model, sizes, "partial_dtensor")
    _localise(model)
    if latent:
        cache_latents(model, config, sizes)
    paged: list[Any] = [layer.attention.inner_attention.paged for layer in model.layers.values()]
    for backend in {each.get_attn_backend().get_name() for each in paged}:
        check_backend(backend, setup.split)
    _serve_experts(model, setup, vllm_config)
    adapters = vllm_config.lora_config is not None
    operators = has_operators(vllm_config.model_config.dtype) and not setup.sharded
    if operators:
        norm_in_one(model)
    if setup.options.cpu_pack and not setup.sharded:
        dtype, once = vllm_config.model_config.dtype, setup.options.cpu_experts_once
        use_packed_weights(model, dtype, experts_once=once, apart=adapters)
    if adapters:
        accept_adapters(model, setup)
    rows = None
    if setup.split.groups > 1:
        rows = GroupRows(setup.split.groups)
        lower(model, sizes, merges=lambda fqn: ".attention." not in fqn)
        group_attention(model, rows)
    else:
        lower(model, sizes)
    pass_on(model, stage)
    ropes = StepRopes(model, operator=operators)
    device = torch.device(vllm_config.device_config.device)
    if not adapters and not setup.sharded:
        join_up(model, device)
    _materialise(model, device)
    ropes.fill(device)
    bind_sinks(model, vllm_config.model_config.dtype)
    if setup.sharded:
        meshes = get_device_meshes(sizes, device_type=device.type)
        shard_dense(model, meshes, layout)
    model._skip_lm_head = True  # TorchTitan's own switch: vLLM asks for logits apart from the forward
    _attach(model, layout)
    attention = cache_form(config, own, vllm_config.model_config.dtype, sizes, latent=latent)
    return Built(
        setup=setup, model=model, ropes=ropes, layout=layout, stage=stage, attention=attention, rows=rows
    )


def _localise(model: nn.Module) -> None:
    """Replace each DTensor by this rank's local shard (still on meta)."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(local(param.data), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = local(buffer)


def experts_kernel(
    setup: Setup, dtype: torch.dtype, capability: DeviceCapability | None
) -> Literal["torch", "triton"] | None:
    """Whose kernel computes routed experts on this GPU without asking the host; None: nobody's.

    `torch._grouped_mm` has one for bfloat16, on Hopper and on Blackwell with compute capability 10, for sizes that it
    takes; elsewhere it is a product for each expert. vLLM's in Triton multiplies by weights of 16 bits of any size.
    Float32 stays with products that round as IEEE says.
    """
    if capability is None or dtype not in (torch.bfloat16, torch.float16):
        return None
    layers = enumerate(setup.config.layers)
    experts = [(at, layer.moe.routed_experts.inner_experts) for at, layer in layers if layer.moe]
    tp = {at: setup.sizes.at(f"layers.{at}.moe").tp if setup.sizes.ep == 1 else 1 for at, _ in experts}
    fit = all(rows_fit((each.hidden_dim // tp[at], each.dim), dtype) for at, each in experts)
    if fit and dtype == torch.bfloat16 and capability.major in (9, 10):
        return "torch"
    return "triton" if all(can_use_triton(each) for _, each in experts) and capability.major >= 8 else None


def captures_experts(setup: Setup, dtype: torch.dtype, capability: DeviceCapability | None) -> bool:
    """Whether a CUDA graph can hold the routed experts: nothing asks the host. An all-to-all does, for its sizes."""
    return not setup.spread and experts_kernel(setup, dtype, capability) is not None


def _serve_experts(model: Decoder, setup: Setup, vllm_config: VllmConfig) -> None:
    capability = current_platform.get_device_capability()
    dtype = vllm_config.model_config.dtype
    kernel, captures = (choose(setup, dtype, capability) for choose in (experts_kernel, captures_experts))
    sizes, rank = setup.sizes, dist.get_rank()
    on_tp, on_ep = (describe(axis, sizes, rank=rank).coordinate(rank)[0] for axis in ("tp", "ep"))
    for index, layer in ((int(name), layer) for name, layer in model.layers.items()):
        moe = getattr(layer, "moe", None)
        if not isinstance(moe, MoE):
            continue
        # Router and experts run on what the rank holds; the MoE block's own boundary reduces the sum.
        strip(moe.router)
        strip(moe.routed_experts)
        experts = moe.routed_experts
        assert isinstance(moe.router, TokenChoiceTopKRouter)
        assert isinstance(experts, RoutedExperts)
        use_float32_gate(moe.router)
        if kernel == "triton":
            use_triton(experts.inner_experts, routes=not setup.sharded)
        if setup.spread:
            experts.token_dispatcher.__class__ = SpreadDispatcher
        elif setup.sizes.ep == 1:
            experts.token_dispatcher.__class__ = TopKSumDispatcher
        else:
            count = moe.router.num_experts // sizes.ep
            experts.token_dispatcher = OwnExpertsDispatcher(
                experts.token_dispatcher, first=count * on_ep, count=count
            )
        moe.routed_experts = ServedExperts(
            experts,
            name=f"model.layers.{index}.mlp.experts",
            layer_id=index,
            token_share=(on_tp, sizes.tp) if setup.spread else None,
            outside_graphs=setup.spread or (current_platform.support_static_graph_mode() and not captures),
            compilation=vllm_config.compilation_config,
            reports=vllm_config.aux_output_config.enabled,
        )


def _materialise(model: Decoder, device: torch.device) -> None:
    """Allocate the local shards, zero, and compute the buffers that no checkpoint holds."""
    tie(model)
    made: dict[torch.Tensor, torch.Tensor] = {}  # by the tensor on meta: two modules may share one
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if tensor not in made:
                    zero = zeros_like(tensor, device)
                    is_parameter = tensors is module._parameters
                    made[tensor] = nn.Parameter(zero, requires_grad=False) if is_parameter else zero
                tensors[name] = made[tensor]
    for module in model.modules():
        if isinstance(module, Module):
            module._init_self_buffers(buffer_device=device)


def _attach(model: nn.Module, layout: Layout) -> None:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in [*module._parameters, *module._buffers]:
            fqn = f"{prefix}.{name}" if prefix else name
            if (known := layout.params.get(fqn)) is not None and getattr(module, name) is not None:
                attach_module(module, name, known.spec.mesh, known.spec.placements)
