"""What titan_bridge asks of a family: configs both ways, weights by name, and what is special about its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from titan_bridge.mesh import ShardPlacement
from titan_bridge.models import decoder, rope
from titan_bridge.models.adapter import Adapter
from titan_bridge.models.fields import Fields
from titan_bridge.sharding.view import View

_NAME = "GatedForCausalLM"
_TINY = {
    "vocab_size": 2048, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip


class GatedConfig(PreTrainedConfig):
    """For config.json, whose `model_type` transformers does not know."""

    model_type = "gated"


def _read(hf: Mapping[str, Any]) -> tuple[decoder.DecoderDims, int]:
    given = Fields(hf, _NAME)
    dims = decoder.read_dims(
        given, rope=rope.read(given, rope_types=("default",)), default_kv_heads=None, default_head_dim=None
    )
    return dims, given.integer("intermediate_size")


class Gated(decoder.DecoderFamily):
    name = "gated"
    architectures = (_NAME,)
    config_class = GatedConfig

    @property
    def model_class(self):
        from gated_model.model import (
            GatedModel,  # imports TorchTitan, which what only names tensors does without
        )

        return GatedModel

    @property
    def sharding(self) -> Gated:
        return self  # it has the two functions that a file in `parallelize/` has

    def set_sharding(self, config, *, enable_ep: bool) -> None:
        from gated_model.model import set_sharding

        set_sharding(config)

    def shard_placement_fn(self, fqn, shape, sizes) -> ShardPlacement:
        return ShardPlacement(mesh="dense")

    def adapters(self) -> Mapping[type, Adapter]:
        from gated_model.model import GatedAttention
        from titan_bridge.models.adapters import grouped_query_attention, head_divisions

        # The gate is an ordinary linear layer; inside, the attention is the usual one.
        return {
            GatedAttention.Config: Adapter(divides=head_divisions, inner_attention=grouped_query_attention)
        }

    def model_config(self, hf, *, padded_vocab=None, expert_bias=False):
        from torchtitan.models.common import ComplexRoPE, Linear

        from gated_model.model import GatedAttention, GatedBlock, GatedModel
        from titan_bridge.models import parts

        dims, hidden_dim = _read(hf)
        layers = []
        for inner in parts.inner_attention_configs([None] * dims.layers):
            plain = parts.attention_config(dims, ComplexRoPE.Config, qk_norm=False, inner=inner)
            stated = {field.name: getattr(plain, field.name) for field in fields(plain) if field.init}
            gate = Linear.Config(
                in_features=dims.dim,
                out_features=dims.heads * dims.head_dim,
                param_init=parts.linear_init(dims),
            )
            layers.append(
                GatedBlock.Config(
                    **parts.norm_fields(dims),
                    attention=GatedAttention.Config(**stated, gate=gate),
                    feed_forward=parts.ffn_config(dims, hidden_dim),
                )
            )
        return GatedModel.Config(layers=layers, **parts.root_fields(dims, padded_vocab))

    def dims(self, hf: Mapping[str, Any]) -> decoder.DecoderDims:
        return _read(hf)[0]

    def views(self, hf, *, padded_vocab=None, fused_qkv=True) -> tuple[View, ...]:
        dims, hidden_dim = _read(hf)
        views = list(decoder.root_views(dims, padded_vocab))
        for layer in range(dims.layers):
            views += decoder.norm_views(layer, dims)
            views += decoder.attention_views(
                layer, dims, qk_norm=False, interleaved=True, fused_qkv=fused_qkv
            )
            views += decoder.ffn_views(layer, dims, hidden_dim)
            names = f"model.layers.{layer}.self_attn.gate.weight", f"layers.{layer}.attention.gate.weight"
            views.append(View.identity(*names, (dims.heads * dims.head_dim, dims.dim)))
        return tuple(views)

    def hf_config(self, config, *, dtype="bfloat16") -> dict[str, Any]:
        from titan_bridge.models import parts

        root = parts.hf_root(config, architecture=_NAME, model_type="gated", dtype=dtype)
        return root | {"intermediate_size": config.layers[0].feed_forward.w1.out_features}

    def flavors(self) -> Mapping[str, Any]:
        return {"tiny": _TINY}

    def model_spec(self, flavor: str):
        """For `titan-bridge train`; what TorchTitan does for Llama 3 is the same for each decoder without experts."""
        from torchtitan.models.llama3.parallelize import parallelize_llama
        from torchtitan.protocols.model_spec import ModelSpec

        return ModelSpec(
            name=self.name,
            flavor=flavor,
            model=self.model_config(self.flavors()[flavor]),
            parallelize_fn=parallelize_llama,
            pipelining_fn=None,
            post_optimizer_build_fn=None,
            state_dict_adapter=None,
        )


FAMILY = Gated()
