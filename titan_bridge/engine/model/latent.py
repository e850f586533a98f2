"""Attention on the latent cache: vLLM's `MLAAttention` below TorchTitan's projections.

TorchTitan expands the latent of a token to keys and values of every head; any backend can cache those
(`PagedAttention`). The latent is much smaller; vLLM's MLA backends cache that, and multiply the query by the key's part
of the expanding weight instead. Both compute the same sums in another order.

Shape suffixes as in `attention`; R = width of the latent, P = width of the rotated part of a key.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.models.common.decoder import Decoder
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import MLAAttention

from titan_bridge.mesh import Sizes
from titan_bridge.models.adapter import InnerAttention, LatentAttention
from titan_bridge.models.adapters import inner_attention, latent_attention


class _KeyValueProjection:
    """What `MLAAttention` asks of the linear layer that expands a latent: TorchTitan's."""

    quant_method = None

    def __init__(self, linear: nn.Module) -> None:
        self._linear = linear

    @property
    def weight(self) -> torch.Tensor:
        return cast(Any, self._linear).weight.data

    @weight.setter
    def weight(self, dropped: torch.Tensor) -> None:
        """Nothing: a backend that has packed it (AMX_MLA) would drop it, and new weights are derived from it again."""

    def __call__(self, latent_TR: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(latent_TR, self.weight), None


class LatentCache(nn.Module):
    """Inner attention of one layer that caches latents."""

    def __init__(
        self, attention: nn.Module, computes: InnerAttention, latent: LatentAttention, *, layer: int, tp: int
    ) -> None:
        """For `attention`, the `layer`-th of the model, whose heads `tp` ranks share."""
        super().__init__()
        vllm_config = get_current_vllm_config()
        self.expands = latent.expands
        with torch.device(vllm_config.device_config.device):
            self.paged = MLAAttention(
                num_heads=computes.n_heads // tp,
                scale=computes.scale,
                qk_nope_head_dim=computes.qk_head_dim - latent.qk_rope_head_dim,
                qk_rope_head_dim=latent.qk_rope_head_dim,
                v_head_dim=computes.v_head_dim,
                q_lora_rank=latent.q_lora_rank,
                kv_lora_rank=latent.kv_lora_rank,
                kv_b_proj=cast(Any, _KeyValueProjection(getattr(attention, latent.expands))),
                cache_config=vllm_config.cache_config,
                prefix=f"model.layers.{layer}.self_attn.attn",
            )

    def forward(self, q_TNH: torch.Tensor, latent_TR: torch.Tensor, k_T1P: torch.Tensor) -> torch.Tensor:
        """Attend over the cached latents, of which `latent_TR` is normed; returns `(T, N * H of v)`."""
        width = self.paged.num_heads * self.paged.v_head_dim
        return self.paged(q_TNH, latent_TR, k_T1P, output_shape=torch.Size((q_TNH.shape[0], width)))


def cache_latents(model: Decoder, config: Decoder.Config, sizes: Sizes) -> None:
    """Let every attention of `model`, which `config` built with `sizes`, cache latents, in place."""
    for name, block in model.layers.items():
        index, attention = int(name), cast(Any, block).attention
        layer = config.layers[index]
        latent = latent_attention(layer.attention)
        assert latent is not None, "vLLM takes a model for one with latents that has none"
        computes, tp = inner_attention(layer.attention), sizes.at(f"layers.{index}.attention").tp
        attention.inner_attention = LatentCache(attention, computes, latent, layer=index, tp=tp)
        attention.__class__ = latent.module


def derive(model: nn.Module, dtype: torch.dtype) -> None:
    """Make what `MLAAttention` derives from the expanding weights anew, in place."""
    for module in model.modules():
        if isinstance(module, LatentCache):
            module.paged.process_weights_after_loading(dtype)


def cache_form(config: Decoder.Config, own: range, dtype: torch.dtype, sizes: Sizes, *, latent: bool) -> str:
    """What attention of the layers `own` caches, and its bytes a token on each rank; with latents, those of the other
    form, too."""
    heads = rows = 0
    for index in own:
        layer = config.layers[index]
        tp = sizes.at(f"layers.{index}.attention").tp
        known, computes = latent_attention(layer.attention), inner_attention(layer.attention)
        heads += dtype.itemsize * 2 * computes.n_kv_heads // tp * computes.qk_head_dim
        rows += dtype.itemsize * known.width if known else 0
    if latent:
        return f"latent attention with a cache of {rows:,} bytes a token (expanded: {heads:,})"
    if rows:
        return f"expanded attention with a cache of {heads:,} bytes a token (latent: {rows:,})"
    return f"attention with a cache of {heads:,} bytes a token"
