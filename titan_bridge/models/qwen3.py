"""Qwen3: dense, and mixture of experts with dense layers among the sparse ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from titan_bridge.models import decoder, rope
from titan_bridge.models.fields import Fields, UnsupportedModelError
from titan_bridge.sharding.view import View

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder
    from torchtitan.models.common.moe import MoE
    from torchtitan.models.qwen3.model import Qwen3Model

_DENSE, _SPARSE = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class _Experts:
    """What a mixture-of-experts config adds. ``hidden_dim`` is one expert's."""

    count: int
    hidden_dim: int
    top_k: int
    renormalise: bool


@dataclass(frozen=True, kw_only=True)
class _Qwen3:
    """One config.json, read: ``hidden_dim`` is that of dense layers; one entry of the tuples a layer."""

    dims: decoder.DecoderDims
    hidden_dim: int
    experts: _Experts | None
    sparse: tuple[bool, ...]
    windows: tuple[int | None, ...]


def _read(hf: Mapping[str, Any]) -> _Qwen3:
    moe = _SPARSE in (hf.get("architectures") or ())
    fields = Fields(hf, _SPARSE if moe else _DENSE)
    # The defaults are those of transformers' config classes, which differ between the two architectures.
    dims = decoder.read_dims(
        fields,
        rope=rope.read(fields, rope_types=("default",)),
        default_kv_heads=4 if moe else None,
        default_head_dim=None if moe else 128,
    )
    experts, sparse = _read_experts(fields, dims.layers) if moe else (None, (False,) * dims.layers)
    needs_dense = not all(sparse)
    return _Qwen3(
        dims=dims,
        hidden_dim=fields.integer("intermediate_size") if needs_dense else 0,
        experts=experts,
        sparse=sparse,
        windows=_read_windows(fields, dims.layers, moe=moe),
    )


def _read_experts(fields: Fields, layers: int) -> tuple[_Experts, tuple[bool, ...]]:
    count = fields.integer("num_experts", "num_local_experts", maximum=1 << 16)
    top_k = fields.integer("num_experts_per_tok")
    if top_k > count:
        raise fields.refusal("num_experts_per_tok", top_k, f"1 to num_experts={count}")
    experts = _Experts(
        count=count,
        hidden_dim=fields.integer("moe_intermediate_size"),
        top_k=top_k,
        renormalise=fields.flag("norm_topk_prob"),
    )
    dense, step = fields.integers("mlp_only_layers"), fields.integer("decoder_sparse_step", default=1)
    return experts, tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _read_windows(fields: Fields, layers: int, *, moe: bool) -> tuple[int | None, ...]:
    """Window of each layer: MoE has one for all, dense has ``layer_types`` or ``max_window_layers``."""
    if not fields.flag("use_sliding_window"):
        stated = fields.hf.get("layer_types") or ()
        if not moe and "sliding_attention" in stated:
            raise fields.refusal(
                "layer_types", "sliding_attention", "full_attention where use_sliding_window is false"
            )
        return (None,) * layers
    window = fields.integer("sliding_window", default=4096)
    if moe:
        return (window,) * layers
    types = fields.hf.get("layer_types")
    if types is None:
        first = fields.integer("max_window_layers", default=28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(layers))
    if (
        not isinstance(types, (list, tuple))
        or len(types) != layers
        or any(kind not in _LAYER_TYPES for kind in types)
    ):
        raise fields.refusal("layer_types", types, f"a list of {layers} out of {', '.join(_LAYER_TYPES)}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


class Qwen3(decoder.DecoderFamily):
    takes_policy = True
    name = "qwen3"
    architectures = (_DENSE, _SPARSE)
    model_types = MappingProxyType({_DENSE: "qwen3", _SPARSE: "qwen3_moe"})

    def architecture(self, *, experts: bool) -> str:
        return _SPARSE if experts else _DENSE

    @property
    def model_class(self) -> type[Qwen3Model]:
        from torchtitan.models.qwen3.model import Qwen3Model  # noqa: PLC0415  two seconds

        return Qwen3Model

    def model_config(
        self, hf: Mapping[str, Any], *, padded_vocab: int | None = None, expert_bias: bool = False
    ) -> Qwen3Model.Config:
        from torchtitan.models.common import CosSinRoPE  # noqa: PLC0415  two seconds, and those below
        from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock  # noqa: PLC0415

        from titan_bridge.models import parts  # noqa: PLC0415

        model = _read(hf)
        dims = model.dims
        layers = [
            Qwen3TransformerBlock.Config(
                **parts.norm_fields(dims),
                attention=parts.attention_config(dims, CosSinRoPE.Config, qk_norm=True, inner=inner),
                feed_forward=None if sparse else parts.ffn_config(dims, model.hidden_dim),
                moe=_moe_config(dims, model.experts, expert_bias) if sparse and model.experts else None,
            )
            for sparse, inner in zip(model.sparse, parts.inner_attention_configs(model.windows), strict=True)
        ]
        return Qwen3Model.Config(layers=layers, **parts.root_fields(dims, padded_vocab))

    def views(
        self, hf: Mapping[str, Any], *, padded_vocab: int | None = None, fused_qkv: bool = True
    ) -> tuple[View, ...]:
        model = _read(hf)
        dims = model.dims
        views = list(decoder.root_views(dims, padded_vocab))
        for layer, sparse in enumerate(model.sparse):
            views += decoder.norm_views(layer, dims)
            views += decoder.attention_views(
                layer, dims, qk_norm=True, interleaved=False, fused_qkv=fused_qkv
            )
            if sparse and model.experts:
                views += decoder.expert_views(layer, dims, model.experts.count, model.experts.hidden_dim)
            else:
                views += decoder.ffn_views(layer, dims, model.hidden_dim)
        return tuple(views)

    def dims(self, hf: Mapping[str, Any]) -> decoder.DecoderDims:
        return _read(hf).dims

    def expert_biases(self, hf: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        model = _read(hf)
        sparse = [layer for layer, sparse in enumerate(model.sparse) if sparse]
        return {
            f"layers.{layer}.moe.expert_bias_E": (model.experts.count,) for layer in sparse if model.experts
        }

    def hf_config(self, config: Decoder.Config, *, dtype: str = "bfloat16") -> dict[str, Any]:
        from titan_bridge.models import parts  # noqa: PLC0415  TorchTitan, two seconds

        dense = [layer.feed_forward for layer in config.layers if layer.moe is None]
        sparse = [layer.moe for layer in config.layers if layer.moe is not None]
        hidden = {"intermediate_size": dense[0].w1.out_features} if dense else {}
        hidden |= _hf_windows(config)
        if not sparse:
            return parts.hf_root(config, architecture=_DENSE, model_type="qwen3", dtype=dtype) | hidden
        root = parts.hf_root(config, architecture=_SPARSE, model_type="qwen3_moe", dtype=dtype)
        return root | hidden | _hf_experts(config, sparse[0])


def _moe_config(dims: decoder.DecoderDims, experts: _Experts, expert_bias: bool) -> MoE.Config:
    from titan_bridge.models import parts  # noqa: PLC0415  TorchTitan, two seconds

    return parts.moe_config(
        dims,
        experts=experts.count,
        hidden_dim=experts.hidden_dim,
        top_k=experts.top_k,
        score_func="softmax",
        route_norm=experts.renormalise,
        expert_bias=expert_bias,
    )


def _hf_windows(config: Decoder.Config) -> dict[str, Any]:
    from titan_bridge.models.adapters import inner_attention  # noqa: PLC0415  TorchTitan, two seconds

    windows = [inner_attention(layer.attention).window for layer in config.layers]
    if not any(windows):
        return {}
    types = [_LAYER_TYPES[window is not None] for window in windows]
    return {"use_sliding_window": True, "sliding_window": max(filter(None, windows)), "layer_types": types}


def _hf_experts(config: Decoder.Config, moe: MoE.Config) -> dict[str, Any]:
    router = moe.router
    if router.score_func != "softmax" or router.route_scale != 1.0 or moe.shared_experts is not None:
        raise UnsupportedModelError(
            f"{_SPARSE}: score_func={router.score_func}, route_scale={router.route_scale}, shared experts "
            f"{'present' if moe.shared_experts else 'absent'} cannot be written; allowed: softmax, 1.0, none"
        )
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.top_k,
        "moe_intermediate_size": moe.routed_experts.inner_experts.hidden_dim,
        "norm_topk_prob": router.route_norm,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, layer in enumerate(config.layers) if layer.moe is None],
    }


FAMILY = Qwen3()
