"""Inner attention for a forward pass over whole sequences, without a KV cache: the reference, not the
engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchtitan.protocols.module import Module


class PlainAttention(Module):
    """Causal attention over sequences that start at position 0, for any device that has a matmul.

    It takes the keywords that TorchTitan passes to an inner attention and no others.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        window: int | None = None
        """Tokens that a query sees, itself included; None for all."""

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
        out_transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention output ``[B, L, N, H of v]``; every batch row is one sequence.

        Args:
            attention_masks: None; which keys a query sees follows from the window.
            scale: Of q @ k; 1 / sqrt(H of q) if not given.
            enable_gqa: Several query heads share a key-value head.
            out_transform: Given the output and its log-sum-exp ``[B, L, N]``, returns what is returned.

        Raises:
            ValueError: Attention masks.
        """
        if attention_masks is not None:
            raise ValueError("PlainAttention is causal and takes no attention_masks")
        q, k, v = (tensor.transpose(1, 2) for tensor in (q_BLNH, k_BLNH, v_BLNH))
        if out_transform is None:
            visible = None if self.window is None else self._visible_LL(q)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=enable_gqa
            )
            return out.transpose(1, 2)
        # SDPA does not return the log-sum-exp.
        if enable_gqa:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        scores_BNLL = (q @ k.transpose(-2, -1)).float() * (scale or q.shape[-1] ** -0.5)
        scores_BNLL = scores_BNLL.masked_fill(~self._visible_LL(q), float("-inf"))
        out = scores_BNLL.softmax(dim=-1).to(v.dtype) @ v
        return out_transform(out.transpose(1, 2), scores_BNLL.logsumexp(dim=-1).transpose(1, 2))

    def _visible_LL(self, q_BNLH: torch.Tensor) -> torch.Tensor:
        place = torch.arange(q_BNLH.shape[2], device=q_BNLH.device)
        back_LL = place[:, None] - place[None, :]
        causal = back_LL >= 0
        return causal if self.window is None else causal & (back_LL < self.window)
