"""DeepSeek-V3 (``DeepseekV3ForCausalLM``), and with it Kimi K2 and Moonlight, which are other sizes of the same model.

Kimi K2 has one group of experts (no limit to groups), one dense layer, and YaRN with ``beta_fast == beta_slow``. What
TorchTitan 0.3 calls kimi_k2_7 is this model with a vision encoder in front (``KimiK25ForConditionalGeneration``), which
is not read here.

Hugging Face and TorchTitan agree on every matrix, so that all views but those of the experts are identities.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from titan_bridge.models import decoder, rope
from titan_bridge.models.adapter import Adapter, Division, InnerAttention, LatentAttention
from titan_bridge.models.fields import Fields, UnsupportedModelError
from titan_bridge.sharding.view import View

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder
    from torchtitan.models.deepseek_v3.model import Attention, DeepSeekV3Model

    from titan_bridge.mesh import Sizes

_NAME = "DeepseekV3ForCausalLM"
_LATENT_EPS = 1e-6
"""Of the norms of the latents; transformers has no field for it."""


@dataclass(frozen=True, kw_only=True)
class _Experts:
    """``hidden_dim`` is one expert's; ``shared`` are experts that every token takes."""

    count: int
    hidden_dim: int
    shared: int
    top_k: int
    groups: int
    top_groups: int
    renormalise: bool
    scale: float


@dataclass(frozen=True, kw_only=True)
class _DeepSeek:
    """One config.json, read. Ranks are widths of latents; ``q_rank`` is 0 where q has none."""

    dims: decoder.DecoderDims
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    dense_layers: int
    hidden_dim: int
    experts: _Experts
    mtp_layers: int

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim


def _read(hf: Mapping[str, Any]) -> _DeepSeek:
    # The defaults are those of transformers' DeepseekV3Config, which sets head_dim itself.
    fields = Fields({**hf, "head_dim": None}, _NAME)
    for name, allowed in (
        ("rope_interleave", True),
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("moe_layer_freq", 1),
    ):
        fields.only(name, (allowed,))
    rope_dim = fields.integer("qk_rope_head_dim", default=64)
    dims = decoder.read_dims(
        fields,
        rope=rope.read(fields, rope_types=("default", "yarn"), mscale=True),
        default_kv_heads=None,
        default_head_dim=rope_dim,
    )
    if dims.kv_heads != dims.heads:
        raise fields.refusal(
            "num_key_value_heads", dims.kv_heads, f"num_attention_heads={dims.heads}: every head has its own"
        )
    dense_layers = fields.integer("first_k_dense_replace", default=3, minimum=0)
    return _DeepSeek(
        dims=dims,
        q_rank=0 if hf.get("q_lora_rank", 1536) is None else fields.integer("q_lora_rank", default=1536),
        kv_rank=fields.integer("kv_lora_rank", default=512),
        nope_dim=fields.integer("qk_nope_head_dim", default=128),
        rope_dim=rope_dim,
        v_dim=fields.integer("v_head_dim", default=128),
        dense_layers=min(dense_layers, dims.layers),
        hidden_dim=fields.integer("intermediate_size", default=18432),
        experts=_read_experts(fields),
        mtp_layers=fields.integer("num_nextn_predict_layers", "num_mtp_layers", default=1, minimum=0),
    )


def _read_experts(fields: Fields) -> _Experts:
    experts = _Experts(
        count=fields.integer("n_routed_experts", "num_local_experts", default=256),
        hidden_dim=fields.integer("moe_intermediate_size", default=2048),
        shared=fields.integer("n_shared_experts", default=1),
        top_k=fields.integer("num_experts_per_tok", default=8),
        groups=fields.integer("n_group", default=8),
        top_groups=fields.integer("topk_group", default=4),
        renormalise=fields.flag("norm_topk_prob", default=True),
        scale=fields.number("routed_scaling_factor", default=2.5),
    )
    if experts.count % experts.groups or experts.count // experts.groups < 2:
        allowed = f"a divisor of n_routed_experts={experts.count} that leaves two in a group"
        raise fields.refusal("n_group", experts.groups, allowed)
    if experts.top_groups > experts.groups:
        raise fields.refusal("topk_group", experts.top_groups, f"1 to n_group={experts.groups}")
    within = experts.count // experts.groups * experts.top_groups
    if experts.top_k > within:
        raise fields.refusal(
            "num_experts_per_tok", experts.top_k, f"1 to {within}, the experts of topk_group groups"
        )
    return experts


class DeepSeekV3(decoder.DecoderFamily):
    takes_policy = True
    name = "deepseek_v3"
    architectures = (_NAME,)

    @property
    def model_class(self) -> type[DeepSeekV3Model]:
        from torchtitan.models.deepseek_v3.model import DeepSeekV3Model  # noqa: PLC0415  two seconds

        return DeepSeekV3Model

    def adapters(self) -> Mapping[type, Adapter]:
        from torchtitan.models.deepseek_v3.model import Attention  # noqa: PLC0415  two seconds

        return {
            Attention.Config: Adapter(
                divides=_divisions,
                inner_attention=_inner_attention,
                latent=_latent,
            )
        }

    def model_config(
        self, hf: Mapping[str, Any], *, padded_vocab: int | None = None, expert_bias: bool = False
    ) -> DeepSeekV3Model.Config:
        """See `Family.model_config`; the expert bias is always there, because checkpoints have it."""
        # TorchTitan takes two seconds to import.
        from torchtitan.models.deepseek_v3.model import (  # noqa: PLC0415
            DeepSeekV3Model,
            DeepSeekV3TransformerBlock,
        )

        from titan_bridge.models import parts  # noqa: PLC0415

        model = _read(hf)
        dims, experts = model.dims, model.experts
        layers = []
        for layer in range(dims.layers):
            feed_forward, moe = parts.ffn_config(dims, model.hidden_dim), None
            if layer >= model.dense_layers:
                feed_forward = None
                moe = parts.moe_config(
                    dims,
                    experts=experts.count,
                    hidden_dim=experts.hidden_dim,
                    top_k=experts.top_k,
                    expert_bias=True,
                    shared=parts.ffn_config(dims, experts.hidden_dim * experts.shared),
                    score_func="sigmoid",
                    num_expert_groups=experts.groups if experts.groups > 1 else None,
                    num_limited_groups=experts.top_groups if experts.groups > 1 else None,
                    route_norm=experts.renormalise,
                    route_scale=experts.scale,
                )
            layers.append(
                DeepSeekV3TransformerBlock.Config(
                    **parts.norm_fields(dims),
                    attention=_attention_config(model),
                    feed_forward=feed_forward,
                    moe=moe,
                )
            )
        return DeepSeekV3Model.Config(layers=layers, **parts.root_fields(dims, padded_vocab))

    def views(
        self, hf: Mapping[str, Any], *, padded_vocab: int | None = None, fused_qkv: bool = True
    ) -> tuple[View, ...]:
        model = _read(hf)
        dims, experts = model.dims, model.experts
        views = list(decoder.root_views(dims, padded_vocab))
        for layer in range(dims.layers):
            views += decoder.norm_views(layer, dims)
            views += _attention_views(layer, model)
            if layer < model.dense_layers:
                views += decoder.ffn_views(layer, dims, model.hidden_dim)
                continue
            views += decoder.expert_views(layer, dims, experts.count, experts.hidden_dim)
            shared = experts.hidden_dim * experts.shared
            views += decoder.ffn_views(
                layer, dims, shared, hf="mlp.shared_experts", titan="moe.shared_experts"
            )
            views.append(
                View.identity(
                    f"model.layers.{layer}.mlp.gate.e_score_correction_bias",
                    f"layers.{layer}.moe.expert_bias_E",
                    (experts.count,),
                )
            )
        return tuple(views)

    def dims(self, hf: Mapping[str, Any]) -> decoder.DecoderDims:
        return _read(hf).dims

    def expert_biases(self, hf: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        model = _read(hf)
        return {
            f"layers.{layer}.moe.expert_bias_E": (model.experts.count,)
            for layer in range(model.dense_layers, model.dims.layers)
        }

    def ignores(self, name: str, hf: Mapping[str, Any]) -> bool:
        """Beside rotary frequencies: the layers past the last, which predict further tokens (MTP)."""
        if layer := re.match(r"model\.layers\.(\d+)\.", name):
            model = _read(hf)
            if 0 <= int(layer[1]) - model.dims.layers < model.mtp_layers:
                return True
        return super().ignores(name, hf)

    def hf_config(self, config: Decoder.Config, *, dtype: str = "bfloat16") -> dict[str, Any]:
        from titan_bridge.models import parts  # noqa: PLC0415  TorchTitan, two seconds

        root = parts.hf_root(config, architecture=_NAME, model_type="deepseek_v3", dtype=dtype)
        attention = config.layers[0].attention
        if attention.rope.scaling == "yarn":
            root["rope_parameters"] |= {"mscale": attention.mscale, "mscale_all_dim": attention.mscale}
        return root | _hf_attention(attention) | _hf_layers(config)


def _divisions(config: Attention.Config, sizes: Sizes) -> Iterator[Division]:
    yield Division(axis="tp", name="n_heads", size=config.n_heads)


def _inner_attention(config: Attention.Config) -> InnerAttention:
    from titan_bridge.models.adapters import window_of  # noqa: PLC0415  TorchTitan, two seconds

    qk_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    scale = qk_dim**-0.5
    if config.rope.scaling == "yarn" and config.rope.rope_factor > 1.0:
        scale *= (0.1 * config.mscale * math.log(config.rope.rope_factor) + 1.0) ** 2
    return InnerAttention(
        n_heads=config.n_heads,
        n_kv_heads=config.n_heads,
        qk_head_dim=qk_dim,
        v_head_dim=config.v_head_dim,
        scale=scale,
        window=window_of(config),
    )


def _latent(config: Attention.Config) -> LatentAttention:
    from titan_bridge.models.deepseek_latent import LatentDeepSeekAttention  # noqa: PLC0415  TorchTitan

    return LatentAttention(
        module=LatentDeepSeekAttention,
        expands="wkv_b",
        q_lora_rank=config.q_lora_rank or None,
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
    )


def _attention_config(model: _DeepSeek) -> Attention.Config:
    # TorchTitan takes two seconds to import.
    from torchtitan.models.common import ComplexRoPE  # noqa: PLC0415
    from torchtitan.models.deepseek_v3 import make_mla_attention_config  # noqa: PLC0415

    from titan_bridge.models import parts  # noqa: PLC0415

    dims = model.dims
    made = make_mla_attention_config(
        layer_id=0,
        dim=dims.dim,
        n_heads=dims.heads,
        q_lora_rank=model.q_rank,
        kv_lora_rank=model.kv_rank,
        qk_nope_head_dim=model.nope_dim,
        qk_rope_head_dim=model.rope_dim,
        v_head_dim=model.v_dim,
        mscale=dims.rope.mscale,
        attn_backend="flex",
        linear_init=parts.linear_init(dims),
        norm_init={},
        depth_init=lambda layer: parts.linear_init(dims),
        rope=dims.rope.config(ComplexRoPE.Config, head_dim=model.rope_dim, max_seq_len=dims.max_seq_len),
    )
    return replace(
        made,
        q_norm=parts.norm_config(model.q_rank or 1, _LATENT_EPS),
        kv_norm=parts.norm_config(model.kv_rank, _LATENT_EPS),
    )


def _attention_views(layer: int, model: _DeepSeek) -> Iterator[View]:
    hf, titan, dims = f"model.layers.{layer}.self_attn", f"layers.{layer}.attention", model.dims
    queries = dims.heads * model.qk_dim
    shapes: dict[tuple[str, str], tuple[int, ...]] = {("q_proj", "wq"): (queries, dims.dim)}
    if model.q_rank:
        shapes = {
            ("q_a_proj", "wq_a"): (model.q_rank, dims.dim),
            ("q_a_layernorm", "q_norm"): (model.q_rank,),
            ("q_b_proj", "wq_b"): (queries, model.q_rank),
        }
    shapes |= {
        ("kv_a_proj_with_mqa", "wkv_a"): (model.kv_rank + model.rope_dim, dims.dim),
        ("kv_a_layernorm", "kv_norm"): (model.kv_rank,),
        ("kv_b_proj", "wkv_b"): (dims.heads * (model.nope_dim + model.v_dim), model.kv_rank),
        ("o_proj", "wo"): (dims.dim, dims.heads * model.v_dim),
    }
    for (theirs, ours), shape in shapes.items():
        yield View.identity(f"{hf}.{theirs}.weight", f"{titan}.{ours}.weight", shape)


def _hf_attention(attention: Attention.Config) -> dict[str, Any]:
    latents = [attention.kv_norm] + ([attention.q_norm] if attention.q_lora_rank else [])
    for norm in latents:
        if norm.eps != _LATENT_EPS:
            raise UnsupportedModelError(
                f"{_NAME}: eps={norm.eps} of the norm of a latent cannot be written; allowed: {_LATENT_EPS}"
            )
    return {
        "head_dim": attention.qk_rope_head_dim,
        "q_lora_rank": attention.q_lora_rank or None,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
    }


def _hf_layers(config: Decoder.Config) -> dict[str, Any]:
    sparse = [layer.moe for layer in config.layers if layer.moe is not None]
    dense = [layer.feed_forward for layer in config.layers if layer.moe is None]
    if getattr(config, "mtp_layers", None):
        raise UnsupportedModelError(f"{_NAME}: mtp_layers cannot be written; train without them")
    if not sparse or any(layer.moe is None for layer in config.layers[len(dense) :]):
        raise UnsupportedModelError(f"{_NAME}: experts must be in every layer from some layer on")
    moe, router = sparse[0], sparse[0].router
    if router.score_func != "sigmoid" or moe.shared_experts is None or moe.load_balance_coeff is None:
        raise UnsupportedModelError(
            f"{_NAME}: score_func={router.score_func}, shared experts "
            f"{'present' if moe.shared_experts else 'absent'}, load_balance_coeff={moe.load_balance_coeff} cannot be "
            "written; allowed: sigmoid, present, a number"
        )
    hidden_dim = moe.routed_experts.inner_experts.hidden_dim
    return {
        "intermediate_size": dense[0].w1.out_features if dense else hidden_dim,
        "moe_intermediate_size": hidden_dim,
        "first_k_dense_replace": len(dense),
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_experts.w1.out_features // hidden_dim,
        "num_experts_per_tok": router.top_k,
        "n_group": router.num_expert_groups or 1,
        "topk_group": router.num_limited_groups or 1,
        "norm_topk_prob": router.route_norm,
        "routed_scaling_factor": router.route_scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }


FAMILY = DeepSeekV3()
