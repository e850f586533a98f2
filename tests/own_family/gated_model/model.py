"""The model as one writes it for TorchTitan: grouped-query attention whose output is multiplied by a gate."""

from __future__ import annotations

from dataclasses import dataclass

import spmd_types as spmd
import torch
from torchtitan.models.common import Linear
from torchtitan.models.common.attention import GQAttention
from torchtitan.models.common.decoder import Decoder, TransformerBlock
from torchtitan.models.common.decoder_sharding import (
    colwise_config,
    dense_activation_placement,
    norm_config,
    set_decoder_sharding_config,
    set_dense_ffn_sharding,
    set_gqa_attention_sharding,
    set_gqa_inner_attention_local_map,
)
from torchtitan.models.utils import get_dense_model_nparams_and_flops


class GatedAttention(GQAttention):
    """Each head's output times the sigmoid of a projection of the input."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        gate: Linear.Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gate = config.gate.build()

    def forward(self, x_BLD: torch.Tensor, attention_masks, positions=None) -> torch.Tensor:
        q_BLNH, k_BLNH, v_BLNH = self.qkv_linear(x_BLD)
        q_BLNH, k_BLNH = self.rope(q_BLNH, k_BLNH, positions)
        out_BLNH = self.inner_attention(
            q_BLNH, k_BLNH, v_BLNH,
            attention_masks=attention_masks, scale=self.scaling, enable_gqa=self.enable_gqa,
        ).contiguous()  # fmt: skip
        return self.wo(out_BLNH.flatten(2) * torch.sigmoid(self.gate(x_BLD)))


class GatedBlock(TransformerBlock):
    @dataclass(kw_only=True, slots=True)
    class Config(TransformerBlock.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = config.attention.build()
        self.feed_forward = config.feed_forward.build()
        self.attention_norm = config.attention_norm.build()
        self.ffn_norm = config.ffn_norm.build()

    def forward(self, x_BLD: torch.Tensor, attention_masks, positions=None) -> torch.Tensor:
        h_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), attention_masks, positions)
        return h_BLD + self.feed_forward(self.ffn_norm(h_BLD))


class GatedModel(Decoder):
    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        def update_from_config(self, *, config, **kwargs) -> None:
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            set_sharding(self)

        def get_nparams_and_flops(self, model, seq_len: int) -> tuple[int, int]:
            attention = self.layers[0].attention
            return get_dense_model_nparams_and_flops(
                model, n_layers=len(self.layers), n_heads=attention.n_heads, head_dims=2 * attention.head_dim,
                seq_len=seq_len, enable_weight_tying=self.enable_weight_tying,
            )  # fmt: skip


def set_sharding(config: GatedModel.Config, *, enable_ep: bool = False) -> None:
    """TorchTitan's declarations for its common parts, and the gate's beside them: cut by heads, as the output is."""
    set_decoder_sharding_config(config, enable_sp=False)
    for layer in config.layers:
        layer.attention_norm.sharding_config = norm_config(enable_sp=False)
        layer.ffn_norm.sharding_config = norm_config(enable_sp=False)
        set_gqa_attention_sharding(layer.attention, enable_sp=False)
        set_gqa_inner_attention_local_map(layer.attention.inner_attention)
        layer.attention.gate.sharding_config = colwise_config()
        set_dense_ffn_sharding(
            layer.feed_forward, attn_x_layout=dense_activation_placement(tp=spmd.I), enable_sp=False
        )
