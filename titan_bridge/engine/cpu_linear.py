"""The one place that knows about CPUs: bfloat16 linears through oneDNN with weights packed beforehand.

`torch.nn.functional.linear` lays a bfloat16 weight out anew at every call, which costs as much as the product
itself at decode sizes; vLLM's own layers pack theirs once, and so do we. The plain weight stays the truth that
loading, transfer and specs work on; the packed copy follows it (`refresh`) and doubles the memory of linears.
float32 keeps torch's own product: it is the referee.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torchtitan.models.common.linear import Linear
from vllm import _custom_ops as ops
from vllm.platforms import current_platform


class PackedLinear(Linear):
    """TorchTitan's `Linear` with a packed copy of its weight; the same parameter under the same name."""

    def pack(self) -> None:
        """Make the packed copy from the weight as it is now."""
        handle = ops.create_onednn_mm(self.weight.data.t(), 32)
        assert handle.handler_tensor is not None
        if (pointer := self.__dict__.get("_pointer")) is None:
            self.__dict__["_pointer"] = handle.handler_tensor.clone()
        else:  # in place: a compiled graph holds this very tensor
            pointer.copy_(handle.handler_tensor)
        self.__dict__["_handle"] = handle  # owns the packed copy, and frees the one before

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        pointer = self.__dict__.get("_pointer")
        if pointer is None:
            return super().forward(input)
        out = input.new_empty((*input.shape[:-1], self.weight.shape[0]))
        torch.ops._C.onednn_mm(
            out.view(-1, out.shape[-1]), input.reshape(-1, input.shape[-1]), self.bias, pointer
        )
        return out


def use_packed_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every plain TorchTitan linear of `model` a `PackedLinear`; does nothing on GPUs and in float32."""
    if not current_platform.is_cpu() or dtype != torch.bfloat16 or not hasattr(torch.ops._C, "onednn_mm"):
        return
    for module in model.modules():
        if type(module) is Linear and module.bias is None:
            module.__class__ = PackedLinear


def refresh(model: nn.Module, changed: Iterable[torch.Tensor] | None = None) -> None:
    """Pack again after weights changed; `changed` are live parameters, None means all."""
    wanted = None if changed is None else {id(tensor) for tensor in changed}
    for module in model.modules():
        if isinstance(module, PackedLinear) and (wanted is None or id(module.weight) in wanted):
            module.pack()
