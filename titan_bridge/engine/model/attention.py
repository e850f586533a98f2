"""vLLM's `Attention` layer standing where TorchTitan's inner attention stood.

Shape suffixes: B = 1 (vLLM packs a batch into one row), L = tokens of the step, N = heads of this rank, H = width of
a head (that of v may be narrower), T = B * L.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.protocols.module import Module
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention

from titan_bridge.models.adapter import InnerAttention


class PagedAttention(Module):
    """Inner attention of one layer: any vLLM backend, paged KV cache, prefix caching, chunked prefill.

    The argument names of `forward` are TorchTitan's, because its sharding config names them. It takes the keywords that
    TorchTitan passes to an inner attention and no others, and checks that they say what it was built for.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        layer: int
        """Index of the layer in the model; vLLM's layer name is made from it."""
        tp: int
        """Ranks that share the heads."""
        computes: InnerAttention
        """Head counts in it are global."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        computes, vllm_config = config.computes, get_current_vllm_config()
        n_heads = computes.n_heads // config.tp
        self.computes = computes
        # The model around it is built on meta; the layer's scales and workspaces must be real.
        with torch.device(vllm_config.device_config.device):
            # The window of a whole model, from config.json, which vLLM would take for a layer that states none.
            vllm_config.cache_config.sliding_window = None
            # A backend that knows sinks is chosen by their being there; `bind_sinks` puts the parameter in their place.
            sinks = {"sinks": torch.empty(n_heads)} if computes.sinks else {}
            self.paged = Attention(
                n_heads,
                computes.qk_head_dim,
                computes.scale,
                num_kv_heads=computes.n_kv_heads // config.tp,
                cache_config=vllm_config.cache_config,
                per_layer_sliding_window=computes.window,
                prefix=f"model.layers.{config.layer}.self_attn.attn",
                **sinks,
            )

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        """Attend over the paged cache; returns `(B, L, N, H of v)` in the dtype of `q_BLNH`.

        Args:
            attention_masks: None: vLLM knows what a query sees.
            scale: The one that the layer was built for, or None.
            enable_gqa: Follows from the shapes.
            out_transform: TorchTitan's way to apply sinks, which vLLM's backend applies here.
        """
        computes = self.computes
        assert attention_masks is None
        assert scale is None or abs(scale - computes.scale) < 1e-6 * computes.scale
        assert (out_transform is not None) == computes.sinks
        # vLLM's cache has one width for keys and values.
        narrow = computes.qk_head_dim - computes.v_head_dim
        if narrow:
            v_BLNH = F.pad(v_BLNH, (0, narrow))
        out_TD = self.paged(
            q_BLNH.flatten(2).squeeze(0), k_BLNH.flatten(2).squeeze(0), v_BLNH.flatten(2).squeeze(0)
        )
        return out_TD.view(q_BLNH.shape)[..., : computes.v_head_dim]


def windows(model: nn.Module) -> set[int | None]:
    """The windows of a model's layers, in tokens; None among them if a layer has none."""
    return {module.computes.window for module in model.modules() if isinstance(module, PagedAttention)}


def bind_sinks(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every backend with sinks read the parameters as they are now.

    Some (FlashInfer, b12x) make a tensor of their own from `_sinks_source`, in float32, and copy into that from then
    on: a CUDA graph holds its address.
    """
    for module in model.modules():
        inner = getattr(module, "inner_attention", None)
        if isinstance(inner, PagedAttention) and inner.computes.sinks:
            impl: Any = inner.paged.impl
            setattr(impl, "_sinks_source" if hasattr(impl, "_sinks_source") else "sinks", module.sinks.data)
            impl.process_weights_after_loading(dtype)
