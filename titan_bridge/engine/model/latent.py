"""DeepSeek's attention on the latent cache: vLLM's `MLAAttention` below TorchTitan's projections.

TorchTitan expands the latent of a token to keys and values of every head; any backend can cache those
(`PagedAttention`). The latent is much smaller; vLLM's MLA backends cache that, and multiply the query by the key's part
of `wkv_b` instead. Both compute the same sums in another order.

Shape suffixes as in `attention`; R = width of the latent, P = width of the rotated part of a key.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3.model import Attention as DeepSeekAttention
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import MLAAttention

from titan_bridge.mesh import Sizes


class _KeyValueProjection(nn.Module):
    """What `MLAAttention` asks of the linear layer that expands a latent; the weight is TorchTitan's."""

    quant_method = None
    weight: torch.Tensor

    def forward(self, latent_TR: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(latent_TR, self.weight), None


class LatentCache(nn.Module):
    """Inner attention of one layer that caches latents."""

    def __init__(self, attention: DeepSeekAttention, *, layer: int, tp: int) -> None:
        """For `attention`, the `layer`-th, whose heads `tp` ranks share."""
        super().__init__()
        vllm_config = get_current_vllm_config()
        with torch.device(vllm_config.device_config.device):
            self.paged = MLAAttention(
                num_heads=attention.n_heads // tp,
                scale=attention.softmax_scale,
                qk_nope_head_dim=attention.qk_nope_head_dim,
                qk_rope_head_dim=attention.qk_rope_head_dim,
                v_head_dim=attention.v_head_dim,
                q_lora_rank=attention.q_lora_rank or None,
                kv_lora_rank=attention.kv_lora_rank,
                kv_b_proj=cast(Any, _KeyValueProjection()),
                cache_config=vllm_config.cache_config,
                prefix=f"model.layers.{layer}.self_attn.attn",
            )

    def forward(self, q_TNH: torch.Tensor, latent_TR: torch.Tensor, k_T1P: torch.Tensor) -> torch.Tensor:
        """Attend over the cached latents, of which `latent_TR` is normed; returns `(T, N * H of v)`."""
        width = self.paged.num_heads * self.paged.v_head_dim
        return self.paged(q_TNH, latent_TR, k_T1P, output_shape=torch.Size((q_TNH.shape[0], width)))


class LatentAttention(DeepSeekAttention):
    """TorchTitan's `Attention` that does not expand latents; the same parameters under the same names."""

    def forward(
        self, x: torch.Tensor, attention_masks: None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(B, L, D)` to `(B, L, D)`."""
        q_BLF = self.wq(x) if self.q_lora_rank == 0 else self.wq_b(self.q_norm(self.wq_a(x)))
        q_BLNH = q_BLF.unflatten(-1, (-1, self.qk_head_dim))
        nope_BLNH, q_BLNP = q_BLNH.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent_BLR, k_BLP = self.wkv_a(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        q_BLNP, k_BL1P = self.rope(q_BLNP, k_BLP.unsqueeze(2), positions)
        out_TF = self.inner_attention(
            torch.cat([nope_BLNH, q_BLNP], dim=-1).flatten(0, 1),
            self.kv_norm(latent_BLR).flatten(0, 1),
            k_BL1P.flatten(0, 1),
        )
        return self.wo(out_TF.view(*x.shape[:-1], -1))


def cache_latents(model: Decoder, sizes: Sizes) -> None:
    """Make every attention of `model`, which has these `sizes`, a `LatentAttention`, in place."""
    for layer, block in enumerate(model.layers.values()):
        attention: Any = block.attention
        assert type(attention) is DeepSeekAttention
        tp = sizes.at(f"layers.{layer}.attention").tp
        attention.inner_attention = LatentCache(attention, layer=layer, tp=tp)
        attention.__class__ = LatentAttention


def derive(model: nn.Module, dtype: torch.dtype) -> None:
    """Make what `MLAAttention` derives from `wkv_b` anew, in place."""
    for module in model.modules():
        if isinstance(module, LatentAttention):
            paged = module.inner_attention.paged
            paged.kv_b_proj.weight = module.wkv_b.weight.data
            paged.process_weights_after_loading(dtype)


def cache_form(model: Decoder, sizes: Sizes) -> str:
    """What DeepSeek's attention caches, and its bytes a token on each rank beside the other form's; else nothing."""
    attention: Any = next(iter(model.layers.values())).attention
    if not isinstance(attention, DeepSeekAttention):
        return ""
    tp = [sizes.at(f"layers.{layer}.attention").tp for layer in model.layers]
    width = {
        "latent": len(tp) * (attention.kv_lora_rank + attention.qk_rope_head_dim),
        "expanded": sum(2 * attention.n_heads // each * attention.qk_head_dim for each in tp),
    }
    item = model.norm.weight.dtype.itemsize
    used, other = sorted(width, reverse=isinstance(attention, LatentAttention))
    return (
        f", {used} attention with a cache of {item * width[used]:,} bytes a token ({other}: "
        f"{item * width[other]:,})"
    )
