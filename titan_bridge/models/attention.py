"""Inner attention for a forward pass over whole sequences, without a KV cache: the reference, not the
engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.models.common.attention import ScaledDotProductAttention, get_sliding_window_mask_mod
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.module import Module

from titan_bridge.models.family import Family


class WindowedAttention(Module):
    """Causal attention in which a query sees ``window`` tokens, itself included."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        window: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.window = config.window

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention output ``[B, L, N, H]``; every batch row is one sequence that starts at position 0."""
        place = torch.arange(q_BLNH.shape[1], device=q_BLNH.device)
        visible = get_sliding_window_mask_mod(self.window)(place, place, place[:, None], place[None, :])
        q, k, v = (tensor.transpose(1, 2) for tensor in (q_BLNH, k_BLNH, v_BLNH))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2)


def use_plain_attention(family: Family, hf: Mapping[str, Any], config: Decoder.Config) -> None:
    """Replace every layer's inner attention by TorchTitan's SDPA module (or a windowed one); in place."""
    for index, layer in enumerate(config.layers):
        window = family.sliding_window(hf, index)
        layer.attention.inner_attention = (
            ScaledDotProductAttention.Config() if window is None else WindowedAttention.Config(window=window)
        )
