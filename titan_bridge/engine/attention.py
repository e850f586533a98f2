"""vLLM's `Attention` layer standing where TorchTitan's inner attention stood.

Shape suffixes: B = 1 (vLLM packs a batch into one row), L = tokens of the step, N = heads held by this rank,
H = head_dim, T = B * L.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.protocols.module import Module
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention


class PagedAttention(Module):
    """Inner attention of one layer: any vLLM backend, paged KV cache, prefix caching, chunked prefill.

    The argument names of `forward` are TorchTitan's, because its sharding config names them.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        layer: int
        """Index of the layer in the model; vLLM's layer name is made from it."""
        n_heads: int
        """Query heads of this rank (local)."""
        n_kv_heads: int
        """Key and value heads of this rank (local)."""
        head_dim: int
        sliding_window: int | None = None
        """Window in tokens, e.g. 4096; None attends to everything."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        vllm_config = get_current_vllm_config()
        # The model around it is built on meta; the layer's scales and workspaces must be real.
        with torch.device(vllm_config.device_config.device):
            self.paged = Attention(
                config.n_heads,
                config.head_dim,
                config.head_dim**-0.5,
                num_kv_heads=config.n_kv_heads,
                cache_config=vllm_config.cache_config,
                per_layer_sliding_window=config.sliding_window,
                prefix=f"model.layers.{config.layer}.self_attn.attn",
            )

    def forward(
        self, q_BLNH: torch.Tensor, k_BLNH: torch.Tensor, v_BLNH: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Attend over the paged cache; returns `(B, L, N, H)` in the dtype of `q_BLNH`.

        The masks, scale and grouping that TorchTitan passes by keyword are vLLM's own business here.
        """
        out_TD = self.paged(
            q_BLNH.flatten(2).squeeze(0), k_BLNH.flatten(2).squeeze(0), v_BLNH.flatten(2).squeeze(0)
        )
        return out_TD.view(q_BLNH.shape)
