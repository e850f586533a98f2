"""One bfloat16 matrix in oneDNN's layout, and the product with it."""

from __future__ import annotations

from functools import cache

import torch
from vllm import _custom_ops as ops


@cache
def product_dtype() -> torch.dtype | None:
    """In what oneDNN multiplies bfloat16 weights here; None: this build of vLLM has no oneDNN.

    On x86 without AVX-512 it has no product in bfloat16, and torch's own takes eight times as long as one in float32:
    weights are held in float32 there.
    """
    if not hasattr(torch.ops._C, "create_onednn_mm_handler"):
        return None
    try:
        ops.create_onednn_mm(torch.zeros(32, 32, dtype=torch.bfloat16), 1)
    except RuntimeError:
        return torch.float32
    return torch.bfloat16


class PackedMatrix:
    """A weight in oneDNN's layout; `pointer` is one tensor for good, which a compiled graph may hold."""

    def __init__(self) -> None:
        self.pointer: torch.Tensor | None = None
        self.dtype = product_dtype()

    def take(self, handle: ops.CPUDNNLGEMMHandler) -> None:
        """What `packed` has made, in the place of what was packed before."""
        assert handle.handler_tensor is not None
        if self.pointer is None:
            self.pointer = handle.handler_tensor.clone()
        else:
            self.pointer.copy_(handle.handler_tensor)
        self._handle = handle  # owns the packed copy, and frees the one before

    def get(self, out_features: int, in_features: int) -> torch.Tensor:
        """What was packed, `(out_features, in_features)`."""
        assert self.pointer is not None
        return plain(self.pointer, out_features, in_features)


def packed(weight_FD: torch.Tensor) -> ops.CPUDNNLGEMMHandler:
    """A copy of `weight_FD`, `(out_features, in_features)` bfloat16, in oneDNN's layout."""
    return ops.create_onednn_mm(weight_FD.to(product_dtype()).t(), 32)


def plain(pointer: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """A packed weight as `(out_features, in_features)`: its product with the identity."""
    plain_FD = torch.empty(out_features, in_features, dtype=torch.bfloat16)
    for first in range(0, in_features, _ROWS):
        columns = plain_FD[:, first : first + _ROWS]
        unit_BD = torch.zeros(columns.shape[1], in_features, dtype=product_dtype())
        unit_BD.diagonal(first).fill_(1)
        column_BF = unit_BD.new_empty(len(unit_BD), out_features)
        torch.ops._C.onednn_mm(column_BF, unit_BD, None, pointer)
        columns.copy_(column_BF.t())
    return plain_FD


def product(
    x: torch.Tensor, out_features: int, matrix: PackedMatrix, bias_F: torch.Tensor | None = None
) -> torch.Tensor:
    """`(..., in_features)` times the packed weight, plus the bias: `(..., out_features)`."""
    x_TD = x.reshape(-1, x.shape[-1]).to(matrix.dtype)
    out_TF = x_TD.new_empty((x_TD.shape[0], out_features))
    bias_F = None if bias_F is None else bias_F.to(matrix.dtype)
    torch.ops._C.onednn_mm(out_TF, x_TD, bias_F, matrix.pointer)
    return out_TF.to(x.dtype).view(*x.shape[:-1], out_features)


_ROWS = 512
"""Of the identity at once."""
