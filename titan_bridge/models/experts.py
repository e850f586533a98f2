"""Routed experts that compute in their weights' dtype.

TorchTitan's ``GroupedExperts.forward`` casts activations and weights to bfloat16 whatever the model's dtype
is. The variant here keeps float32 (and float16) and is TorchTitan's own code when the weights are bfloat16,
bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torchtitan.models.common.moe import GroupedExperts

# torch._grouped_mm wants every row to start at a multiple of this many bytes.
_ROW_BYTES = 16


class KeepDtypeExperts(GroupedExperts):
    """What other ways to compute the same experts are made from."""

    def matrices(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """This rank's: those up ``(E, rows, D)``, whose products lie side by side, and the one down ``(E, D, F)``."""
        raise NotImplementedError

    def biases(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of up and down, this rank's share: ``(E, G)``, ``(E, D)``; without ``forward``'s gradient."""
        raise NotImplementedError

    def activate(self, wide_RG: torch.Tensor) -> torch.Tensor:
        """Products of up ``(R, G)`` to hidden rows ``(R, F)``."""
        raise NotImplementedError


class KeepDtypeGroupedExperts(KeepDtypeExperts):
    """``GroupedExperts`` without the cast; same parameters, same names."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def matrices(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        return [local(self.w1_EFD), local(self.w3_EFD)], local(self.w2_EDF)

    def biases(self) -> tuple[None, None]:
        return None, None

    def activate(self, wide_RG: torch.Tensor) -> torch.Tensor:
        gate_RF, up_RF = wide_RG.chunk(2, dim=-1)
        return F.silu(gate_RF) * up_RF

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """Expert outputs ``[R, D]`` in ``x_RD``'s dtype.

        Args:
            x_RD: Rank-local tokens, sorted by local expert; rows beyond the sum of the counts get undefined
                values.
            num_tokens_per_expert_E: Integer count for each local expert.
        """
        (w1, w3), w2 = self.matrices()
        if w1.dtype == torch.bfloat16 and rows_fit(w1.shape[1:], w1.dtype):
            return GroupedExperts.forward(self, x_RD, num_tokens_per_expert_E)
        ends = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        x = x_RD.to(w1.dtype)
        hidden = F.silu(grouped_product(self, x, w1, ends)) * grouped_product(self, x, w3, ends)
        return grouped_product(self, hidden, w2, ends).type_as(x_RD)


def grouped_product(
    experts: GroupedExperts, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """``x[rows of e] @ weight[e].T`` for each expert e: ``[R, in], [E, out, in] -> [R, out]``.

    Sizes that ``torch._grouped_mm`` refuses are computed one by one, which reads ``ends`` on the host.
    """
    if rows_fit(weight.shape[1:], weight.dtype):
        return experts._grouped_mm(A=x, B_t=weight.transpose(-2, -1), offs=ends)
    out = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = x[start:end] @ weight[expert].T
        start = end
    return out


def rows_fit(sizes: Iterable[int], dtype: torch.dtype) -> bool:
    """Whether ``torch._grouped_mm`` takes rows of these lengths (elements); both widths of an expert are lengths."""
    return dtype != torch.float64 and not any(size * dtype.itemsize % _ROW_BYTES for size in sizes)


def expert_of_rows(ends_E: torch.Tensor, rows: int) -> torch.Tensor:
    """Which expert each row is of, ``(rows,)`` int64, by where experts' rows end; those beyond are the last one's."""
    rows_R = torch.arange(rows, dtype=ends_E.dtype, device=ends_E.device)
    return torch.searchsorted(ends_E, rows_R, right=True).clamp(max=len(ends_E) - 1)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; another tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
