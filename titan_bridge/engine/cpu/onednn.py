"""One bfloat16 matrix in oneDNN's layout, and the product with it."""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops


class PackedMatrix:
    """A weight in oneDNN's layout; `pointer` is one tensor for good, which a compiled graph may hold."""

    def __init__(self) -> None:
        self.pointer: torch.Tensor | None = None

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
    return ops.create_onednn_mm(weight_FD.t(), 32)


def plain(pointer: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """A packed weight as `(out_features, in_features)`: its product with the identity."""
    plain_FD = torch.empty(out_features, in_features, dtype=torch.bfloat16)
    for first in range(0, in_features, _ROWS):
        columns = plain_FD[:, first : first + _ROWS]
        unit_BD = torch.zeros(columns.shape[1], in_features, dtype=torch.bfloat16)
        unit_BD.diagonal(first).fill_(1)
        columns.copy_(product(unit_BD, out_features, pointer).t())
    return plain_FD


def product(
    x: torch.Tensor, out_features: int, pointer: torch.Tensor, bias_F: torch.Tensor | None = None
) -> torch.Tensor:
    """`(..., in_features)` times the packed weight, plus the bias: `(..., out_features)`."""
    x_TD = x.reshape(-1, x.shape[-1])
    out_TF = x.new_empty((x_TD.shape[0], out_features))
    torch.ops._C.onednn_mm(out_TF, x_TD, bias_F, pointer)
    return out_TF.view(*x.shape[:-1], out_features)


_ROWS = 512
"""Of the identity at once."""
