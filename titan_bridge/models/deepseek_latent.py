"""DeepSeek's attention that hands latents to its inner attention, which caches them; see `adapter.LatentAttention`.

Shape suffixes: B = batch, L = tokens, T = B * L, D = dim, N = heads, H = width of a query, of which the last P are
rotated, R = width of the latent.
"""

from __future__ import annotations

import torch
from torchtitan.models.deepseek_v3.model import Attention


class LatentDeepSeekAttention(Attention):
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
