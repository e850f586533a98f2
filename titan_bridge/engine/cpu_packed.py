"""The one place that knows about CPUs: bfloat16 products through oneDNN with weights packed beforehand.

`torch.nn.functional.linear` and `torch._grouped_mm` lay a bfloat16 weight out anew at every call, which costs as much
as the product itself at decode sizes; vLLM's own layers pack theirs once, and so do we. The plain weight stays the
truth that loading, transfer and specs work on; the packed copy follows it (`refresh`) and doubles the memory of linears
and experts. float32 keeps torch's own product: it is the referee.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import nn
from torchtitan.models.common.linear import Linear
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from titan_bridge.models.experts import KeepDtypeGroupedExperts


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


class PackedExperts(KeepDtypeGroupedExperts):
    """TorchTitan's `GroupedExperts` with packed copies of its weights; the same parameters under the same names.

    Runs inside the opaque operator of routed experts only: it reads counts on the host.
    """

    def pack(self) -> None:
        """Make the packed copies from the weights as they are now; `w1` and `w3` become one product."""
        self.__dict__["_handles"] = [
            (
                ops.create_onednn_mm(torch.cat([w1_FD.data, w3_FD.data]).t(), 32),
                ops.create_onednn_mm(w2_DF.data.t(), 32),
            )
            for w1_FD, w2_DF, w3_FD in zip(self.w1_EFD, self.w2_EDF, self.w3_EFD, strict=True)
        ]

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """`(R, D)` to `(R, D)`; rows beyond the sum of the counts get undefined values."""
        handles = self.__dict__.get("_handles")
        if handles is None:
            return super().forward(x_RD, num_tokens_per_expert_E)
        given, x_RD = x_RD, x_RD.to(self.w1_EFD.dtype)
        wide_RF2 = x_RD.new_empty(x_RD.shape[0], 2 * self.w1_EFD.shape[1])
        h_RF = x_RD.new_empty(x_RD.shape[0], self.w1_EFD.shape[1])
        out_RD = torch.empty_like(x_RD)
        counts = num_tokens_per_expert_E.tolist()
        edges = [0, *itertools.accumulate(counts)]
        spans = [(e, slice(edges[e], edges[e + 1])) for e, count in enumerate(counts) if count]
        for e, rows in spans:
            torch.ops._C.onednn_mm(wide_RF2[rows], x_RD[rows], None, handles[e][0].handler_tensor)
        torch.ops._C.silu_and_mul(h_RF, wide_RF2)
        for e, rows in spans:
            torch.ops._C.onednn_mm(out_RD[rows], h_RF[rows], None, handles[e][1].handler_tensor)
        return out_RD.type_as(given)


def use_packed_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Make TorchTitan's plain linears and routed experts of `model` packed ones; nothing on GPUs and in float32."""
    if not current_platform.is_cpu() or dtype != torch.bfloat16 or not hasattr(torch.ops._C, "onednn_mm"):
        return
    for module in model.modules():
        if type(module) is Linear and module.bias is None:
            module.__class__ = PackedLinear
        elif type(module) is KeepDtypeGroupedExperts:
            module.__class__ = PackedExperts


def refresh(model: nn.Module, changed: Iterable[torch.Tensor] | None = None) -> None:
    """Pack again after weights changed; `changed` are live parameters, None means all."""
    wanted = None if changed is None else {id(tensor) for tensor in changed}
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedExperts) and (
            wanted is None or any(id(param) in wanted for param in module.parameters(recurse=False))
        ):
            module.pack()
