"""Llama 3 (and every ``LlamaForCausalLM`` with plain or llama3-scaled rotary positions)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from titan_bridge.models import decoder, rope
from titan_bridge.models.fields import Fields
from titan_bridge.sharding.view import View

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder
    from torchtitan.models.llama3.model import Llama3Model


def _read(hf: Mapping[str, Any]) -> tuple[decoder.DecoderDims, int]:
    """Common sizes and the feed-forward's hidden size."""
    fields = Fields(hf, "LlamaForCausalLM")
    fields.only("mlp_bias", (False,))
    dims = decoder.read_dims(
        fields,
        rope=rope.read(fields, rope_types=("default", "llama3")),
        default_kv_heads=None,
        default_head_dim=None,
    )
    return dims, fields.integer("intermediate_size")


class Llama3(decoder.DecoderFamily):
    takes_policy = True
    name = "llama3"
    architectures = ("LlamaForCausalLM",)
    model_types = MappingProxyType({"LlamaForCausalLM": "llama"})

    @property
    def model_class(self) -> type[Llama3Model]:
        from torchtitan.models.llama3.model import Llama3Model  # noqa: PLC0415  two seconds

        return Llama3Model

    def model_config(
        self, hf: Mapping[str, Any], *, padded_vocab: int | None = None, expert_bias: bool = False
    ) -> Llama3Model.Config:
        from torchtitan.models.common import ComplexRoPE  # noqa: PLC0415  two seconds, and those below
        from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock  # noqa: PLC0415

        from titan_bridge.models import parts  # noqa: PLC0415

        dims, hidden_dim = _read(hf)
        layers = [
            Llama3TransformerBlock.Config(
                **parts.norm_fields(dims),
                attention=parts.attention_config(dims, ComplexRoPE.Config, qk_norm=False, inner=inner),
                feed_forward=parts.ffn_config(dims, hidden_dim),
            )
            for inner in parts.inner_attention_configs([None] * dims.layers)
        ]
        return Llama3Model.Config(layers=layers, **parts.root_fields(dims, padded_vocab))

    def views(
        self, hf: Mapping[str, Any], *, padded_vocab: int | None = None, fused_qkv: bool = True
    ) -> tuple[View, ...]:
        dims, hidden_dim = _read(hf)
        views = list(decoder.root_views(dims, padded_vocab))
        for layer in range(dims.layers):
            views += decoder.norm_views(layer, dims)
            views += decoder.attention_views(
                layer, dims, qk_norm=False, interleaved=True, fused_qkv=fused_qkv
            )
            views += decoder.ffn_views(layer, dims, hidden_dim)
        return tuple(views)

    def dims(self, hf: Mapping[str, Any]) -> decoder.DecoderDims:
        return _read(hf)[0]

    def hf_config(self, config: Decoder.Config, *, dtype: str = "bfloat16") -> dict[str, Any]:
        from titan_bridge.models import parts  # noqa: PLC0415  TorchTitan, two seconds

        root = parts.hf_root(config, architecture="LlamaForCausalLM", model_type="llama", dtype=dtype)
        return root | {"intermediate_size": config.layers[0].feed_forward.w1.out_features, "mlp_bias": False}


FAMILY = Llama3()
