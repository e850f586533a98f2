"""Steps that are not compiled: one of vLLM's operators where torch has ten, for RMSNorm and rotary embeddings.

Both compute in float32 and round once, as torch's do; on x86 without AVX-512 vLLM's RMSNorm cuts bits off where it
should round, and torch's stays. Compiled steps have torch's, which the compiler joins with what is around them; float32
models have torch's always: they are the referee.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torchtitan.models.common.nn_modules import RMSNorm
from vllm.platforms import current_platform


def has_operators(dtype: torch.dtype) -> bool:
    """Whether a model of `dtype` takes vLLM's operators here."""
    return current_platform.is_cpu() and dtype == torch.bfloat16 and hasattr(torch.ops._C, "rms_norm")


@cache
def norm_rounds() -> bool:
    """Whether vLLM's RMSNorm rounds to the nearest bfloat16 on this processor."""
    x_TD = torch.linspace(-3, 3, 64 * 64, dtype=torch.bfloat16).view(64, 64)
    found_TD, weight_D = torch.empty_like(x_TD), torch.ones(64, dtype=torch.bfloat16)
    torch.ops._C.rms_norm(found_TD, x_TD, weight_D, 1e-6)
    wanted_TD = nn.functional.rms_norm(x_TD.float(), (64,), eps=1e-6).to(torch.bfloat16)
    return (found_TD == wanted_TD).float().mean().item() > 0.95


class NormInOne(RMSNorm):
    """TorchTitan's `RMSNorm`, a third of the time or less."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., D)` to `(..., D)`."""
        if torch.compiler.is_compiling() or x.dtype != torch.bfloat16 or self.weight is None:
            return super().forward(x)
        out = torch.empty(x.shape, dtype=x.dtype)
        torch.ops._C.rms_norm(out, x.contiguous(), self.weight, self.eps)
        return out


def norm_in_one(model: nn.Module) -> None:
    """Let every `RMSNorm` of `model` be `NormInOne`, where that rounds."""
    if not norm_rounds():
        return
    for module in model.modules():
        if type(module) is RMSNorm:
            module.__class__ = NormInOne


def table_for_operator(
    cache_PW: torch.Tensor, positions_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `CosSinRoPE`'s table for `rotate_in_one`, without a copy, and the rows of it that `positions_T` have.

    A position's row is (cos, cos, sin, sin), each half a head wide; the operator wants (cos, sin). That stands in the
    middle of it, hence in every second row of a table of half the width that begins at the second cos.
    """
    half = cache_PW.shape[-1] // 4
    return cache_PW.flatten()[half:-half].view(-1, 2 * half), positions_T * 2


def rotate_in_one(
    query_BLNH: torch.Tensor, key_BLNH: torch.Tensor, table_RH: torch.Tensor, rows_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`CosSinRoPE.apply_rotary_emb` with what `table_for_operator` returned."""
    query, key = query_BLNH.float().contiguous(), key_BLNH.float().contiguous()
    torch.ops._C.rotary_embedding(
        rows_T, query.flatten(0, 1).flatten(1), key.flatten(0, 1).flatten(1), query.shape[-1], table_RH, True
    )
    return query.type_as(query_BLNH), key.type_as(key_BLNH)
