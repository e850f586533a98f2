"""gpt-oss: attention with sinks and, in some layers, a window; every projection has a bias; clamped SwiGLU experts.

TorchTitan's own state-dict adapter leaves the experts out, so that the views here are held against transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from titan_bridge.models import decoder, rope
from titan_bridge.models.adapter import Adapter, InnerAttention
from titan_bridge.models.fields import Fields, UnsupportedModelError
from titan_bridge.sharding.view import View

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder
    from torchtitan.models.gpt_oss.model import Attention, GptOssModel
    from torchtitan.models.gpt_oss.moe import GptOssMoE

_NAME = "GptOssForCausalLM"
_LAYER_TYPES = ("full_attention", "sliding_attention")
_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True)
class _GptOss:
    """One config.json, read: ``hidden_dim`` is one expert's; one entry of ``windows`` a layer."""

    dims: decoder.DecoderDims
    experts: int
    top_k: int
    hidden_dim: int
    swiglu_limit: float
    windows: tuple[int | None, ...]


def _read(hf: Mapping[str, Any]) -> _GptOss:
    # The defaults are those of transformers' GptOssConfig.
    if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
        hf = {**hf, "rope_parameters": _DEFAULT_ROPE}
    fields = Fields(hf, _NAME)
    fields.only("swiglu_alpha", (1.702,))
    dims = decoder.read_dims(
        fields,
        rope=rope.read(fields, rope_types=("default", "yarn"), default_theta=150000.0),
        default_kv_heads=8,
        default_head_dim=64,
        default_eps=1e-5,
        attention_bias=True,
    )
    experts = fields.integer("num_local_experts", "num_experts", default=128)
    top_k = fields.integer("num_experts_per_tok", "experts_per_token", default=4)
    if top_k > experts:
        raise fields.refusal("num_experts_per_tok", top_k, f"1 to num_local_experts={experts}")
    return _GptOss(
        dims=dims,
        experts=experts,
        top_k=top_k,
        hidden_dim=fields.integer("intermediate_size", default=2880),
        swiglu_limit=fields.number("swiglu_limit", default=7.0),
        windows=_read_windows(fields, dims.layers),
    )


def _read_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    window = fields.integer("sliding_window", default=128)
    types = fields.hf.get("layer_types")
    if types is None:
        types = [_LAYER_TYPES[(layer + 1) % 2] for layer in range(layers)]
    if not isinstance(types, (list, tuple)) or len(types) != layers or set(types) - set(_LAYER_TYPES):
        raise fields.refusal("layer_types", types, f"a list of {layers} out of {', '.join(_LAYER_TYPES)}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


class GptOss(decoder.DecoderFamily):
    takes_policy = True
    name = "gpt_oss"
    architectures = (_NAME,)

    @property
    def model_class(self) -> type[GptOssModel]:
        from torchtitan.models.gpt_oss.model import GptOssModel  # noqa: PLC0415  two seconds

        return GptOssModel

    def adapters(self) -> Mapping[type, Adapter]:
        # TorchTitan takes two seconds to import.
        from torchtitan.models.gpt_oss.model import Attention  # noqa: PLC0415
        from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts  # noqa: PLC0415

        from titan_bridge.models.adapters import expert_divisions, head_divisions  # noqa: PLC0415
        from titan_bridge.models.gpt_oss_experts import KeepDtypeGptOssExperts  # noqa: PLC0415

        return {
            Attention.Config: Adapter(
                divides=head_divisions,
                inner_attention=_inner_attention,
            ),
            GptOssGroupedExperts.Config: Adapter(
                divides=expert_divisions, keeps_dtype=KeepDtypeGptOssExperts
            ),
        }

    def model_config(
        self, hf: Mapping[str, Any], *, padded_vocab: int | None = None, expert_bias: bool = False
    ) -> GptOssModel.Config:
        # TorchTitan takes two seconds to import.
        from torchtitan.models.gpt_oss.model import GptOssModel, GptOssTransformerBlock  # noqa: PLC0415

        from titan_bridge.models import parts  # noqa: PLC0415

        model = _read(hf)
        dims = model.dims
        layers = [
            GptOssTransformerBlock.Config(
                **parts.norm_fields(dims),
                attention=_attention_config(dims, window),
                moe=_moe_config(model, expert_bias),
            )
            for window in model.windows
        ]
        return GptOssModel.Config(layers=layers, **parts.root_fields(dims, padded_vocab))

    def views(
        self, hf: Mapping[str, Any], *, padded_vocab: int | None = None, fused_qkv: bool = True
    ) -> tuple[View, ...]:
        model = _read(hf)
        dims = model.dims
        views = list(decoder.root_views(dims, padded_vocab))
        for layer in range(dims.layers):
            views += decoder.norm_views(layer, dims)
            views += decoder.attention_views(
                layer, dims, qk_norm=False, interleaved=False, fused_qkv=fused_qkv, bias=True
            )
            sinks = f"layers.{layer}.attention.sinks"
            views.append(View.identity(f"model.layers.{layer}.self_attn.sinks", sinks, (dims.heads,)))
            views += _moe_views(layer, model)
        return tuple(views)

    def dims(self, hf: Mapping[str, Any]) -> decoder.DecoderDims:
        return _read(hf).dims

    def expert_biases(self, hf: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        model = _read(hf)
        return {f"layers.{layer}.moe.expert_bias_E": (model.experts,) for layer in range(model.dims.layers)}

    def hf_config(self, config: Decoder.Config, *, dtype: str = "bfloat16") -> dict[str, Any]:
        from titan_bridge.models import parts  # noqa: PLC0415  TorchTitan, two seconds

        moe, router = config.layers[0].moe, config.layers[0].moe.router
        if router.score_func != "softmax" or not router.route_norm or router.route_scale != 1.0:
            raise UnsupportedModelError(
                f"{_NAME}: score_func={router.score_func}, route_norm={router.route_norm}, "
                f"route_scale={router.route_scale} cannot be written; allowed: softmax, True, 1.0"
            )
        windows = [layer.attention.sliding_window_size for layer in config.layers]
        experts = moe.routed_experts.inner_experts
        root = parts.hf_root(config, architecture=_NAME, model_type="gpt_oss", dtype=dtype)
        return root | {
            "attention_bias": True,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": router.top_k,
            "intermediate_size": experts.hidden_dim,
            "swiglu_limit": experts.swiglu_limit,
            "sliding_window": next(filter(None, windows), 128),
            "layer_types": [_LAYER_TYPES[window is not None] for window in windows],
        }


def _inner_attention(config: Attention.Config) -> InnerAttention:
    scale = config.head_dim**-0.5
    if config.rope.scaling == "yarn" and config.rope.rope_factor > 1.0:
        scale *= (0.1 * math.log(config.rope.rope_factor) + 1.0) ** 2
    return InnerAttention(
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        qk_head_dim=config.head_dim,
        v_head_dim=config.head_dim,
        scale=scale,
        window=config.sliding_window_size,
        sinks=True,
    )


def _attention_config(dims: decoder.DecoderDims, window: int | None) -> Attention.Config:
    # TorchTitan takes two seconds to import.
    from torch import nn  # noqa: PLC0415
    from torchtitan.models.common import CosSinRoPE, Linear  # noqa: PLC0415
    from torchtitan.models.common.attention import FusedQKVLinear, VarlenAttention  # noqa: PLC0415
    from torchtitan.models.common.linear import ScaledBiasRowwiseLinear  # noqa: PLC0415
    from torchtitan.models.gpt_oss.model import Attention  # noqa: PLC0415

    from titan_bridge.models import parts  # noqa: PLC0415

    init, width = parts.linear_init(dims), dims.heads * dims.head_dim
    return Attention.Config(
        n_heads=dims.heads,
        n_kv_heads=dims.kv_heads,
        head_dim=dims.head_dim,
        dim=dims.dim,
        qkv_linear=FusedQKVLinear.Config(
            head_dim=dims.head_dim,
            n_heads=dims.heads,
            n_kv_heads=dims.kv_heads,
            wqkv=Linear.Config(
                in_features=dims.dim,
                out_features=width + 2 * dims.kv_heads * dims.head_dim,
                bias=True,
                param_init=init,
            ),
        ),
        wo=ScaledBiasRowwiseLinear.Config(
            in_features=width, out_features=dims.dim, bias=True, param_init=init
        ),
        sliding_window_size=window,
        inner_attention=VarlenAttention.Config(window_size=(window - 1 if window else -1, 0)),
        param_init={"sinks": partial(nn.init.normal_, std=dims.init_std)},
        rope=dims.rope.config(CosSinRoPE.Config, head_dim=dims.head_dim, max_seq_len=dims.max_seq_len),
    )


def _moe_config(model: _GptOss, expert_bias: bool) -> GptOssMoE.Config:
    # TorchTitan takes two seconds to import.
    from torch import nn  # noqa: PLC0415
    from torchtitan.models.common import Linear  # noqa: PLC0415
    from torchtitan.models.common.config_utils import make_token_dispatcher_config  # noqa: PLC0415
    from torchtitan.models.common.moe import RoutedExperts, TokenChoiceTopKRouter  # noqa: PLC0415
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, GptOssMoE  # noqa: PLC0415

    from titan_bridge.models import parts  # noqa: PLC0415

    normal = partial(nn.init.normal_, std=model.dims.init_std)
    names = ("mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED")
    return GptOssMoE.Config(
        num_experts=model.experts,
        load_balance_coeff=parts.LOAD_BALANCE_COEFF if expert_bias else None,
        routed_experts=RoutedExperts.Config(
            inner_experts=GptOssGroupedExperts.Config(
                dim=model.dims.dim,
                hidden_dim=model.hidden_dim,
                num_experts=model.experts,
                swiglu_limit=model.swiglu_limit,
                param_init=dict.fromkeys(names, normal),
            ),
            token_dispatcher=make_token_dispatcher_config(
                num_experts=model.experts, top_k=model.top_k, comm_backend="standard"
            ),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=model.experts,
            score_func="softmax",
            # Softmax over the chosen experts, as transformers has it.
            route_norm=True,
            gate=Linear.Config(
                in_features=model.dims.dim,
                out_features=model.experts,
                bias=True,
                param_init=parts.linear_init(model.dims),
            ),
            top_k=model.top_k,
        ),
    )


def _moe_views(layer: int, model: _GptOss) -> Iterator[View]:
    """Both sides have gate and up in alternating rows; Hugging Face has the matrices of all experts transposed."""
    hf, titan = f"model.layers.{layer}.mlp", f"layers.{layer}.moe"
    count, dim, hidden = model.experts, model.dims.dim, model.hidden_dim
    yield View.identity(f"{hf}.router.weight", f"{titan}.router.gate.weight", (count, dim))
    yield View.identity(f"{hf}.router.bias", f"{titan}.router.gate.bias", (count,))
    for name, ours, rows, columns, axes in (
        ("gate_up_proj", "mlp1", 2 * hidden, dim, ("EGD", "EG")),
        ("down_proj", "mlp2", dim, hidden, ("EDF", "ED")),
    ):
        experts = f"{titan}.routed_experts.inner_experts.{ours}"
        yield View(
            name=f"{hf}.experts.{name}",
            fqn=f"{experts}_weight_{axes[0]}",
            shape=(count, columns, rows),
            factors=((count,), (rows,), (columns,)),
            index=((0, count), (0, rows), (0, columns)),
            permute=(0, 2, 1),
        )
        yield View.identity(f"{hf}.experts.{name}_bias", f"{experts}_bias_{axes[1]}", (count, rows))


FAMILY = GptOss()
