"""The one place that knows about CPUs: bfloat16 products through oneDNN with weights packed beforehand.

`torch.nn.functional.linear` and `torch._grouped_mm` lay a bfloat16 weight out anew at every call, which costs as much
as the product itself at decode sizes; vLLM's own layers pack theirs once, and so do we. The packed copy follows the
plain weight, which loading and transfer write; whether that stays is `packing`'s matter. float32 keeps torch's own
product: it is the referee.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.models.common.attention import FusedQKVLinear
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from titan_bridge.engine.model.latent import LatentCache
from titan_bridge.models.experts import KeepDtypeGroupedExperts


class _Packed:
    """A weight in oneDNN's layout; `pointer` is one tensor for good, which a compiled graph may hold."""

    def __init__(self) -> None:
        self.pointer: torch.Tensor | None = None

    def set(self, weight_FD: torch.Tensor) -> None:
        """Pack `weight_FD`, `(out_features, in_features)` bfloat16, in the place of what was packed before."""
        handle = ops.create_onednn_mm(weight_FD.t(), 32)
        assert handle.handler_tensor is not None
        if self.pointer is None:
            self.pointer = handle.handler_tensor.clone()
        else:
            self.pointer.copy_(handle.handler_tensor)
        self._handle = handle  # owns the packed copy, and frees the one before

    def get(self, out_features: int, in_features: int) -> torch.Tensor:
        """What was packed, `(out_features, in_features)`."""
        assert self.pointer is not None
        return _plain(self.pointer, out_features, in_features)


def _plain(pointer: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """A packed weight as `(out_features, in_features)`: its product with the identity."""
    plain_FD = torch.empty(out_features, in_features, dtype=torch.bfloat16)
    for first in range(0, in_features, _ROWS):
        columns = plain_FD[:, first : first + _ROWS]
        unit_BD = torch.zeros(columns.shape[1], in_features, dtype=torch.bfloat16)
        unit_BD.diagonal(first).fill_(1)
        columns.copy_(_product(unit_BD, out_features, pointer).t())
    return plain_FD


def _product(x: torch.Tensor, out_features: int, pointer: torch.Tensor) -> torch.Tensor:
    """`(..., in_features)` times the packed weight: `(..., out_features)`."""
    x_TD = x.reshape(-1, x.shape[-1])
    out_TF = x.new_empty((x_TD.shape[0], out_features))
    torch.ops._C.onednn_mm(out_TF, x_TD, None, pointer)
    return out_TF.view(*x.shape[:-1], out_features)


def _joined(first_FD: torch.Tensor, second_FD: torch.Tensor) -> torch.Tensor:
    """Both, one under the other: no copy where they lie so in memory."""
    follows = second_FD.data_ptr() == first_FD.data_ptr() + first_FD.nbytes
    if follows and first_FD.untyped_storage().data_ptr() == second_FD.untyped_storage().data_ptr():
        rows = first_FD.shape[0] + second_FD.shape[0]
        return first_FD.as_strided((rows, first_FD.shape[1]), first_FD.stride())
    return torch.cat([first_FD, second_FD])


class PackedLinear(Linear):
    """TorchTitan's `Linear` with a packed copy of its weight; the same parameter under the same name."""

    def packs(self) -> list[nn.Parameter]:
        """The weights that the packed copy is made from."""
        return [self.weight]

    def pack(self) -> None:
        """Make the packed copy from the weight as it is now."""
        self.__dict__.setdefault("_packed", _Packed()).set(self.weight.data)

    def unpack(self) -> None:
        """Fill the weight from the packed copy, which does not tell -0 from 0; a row with an infinity becomes NaN."""
        self.weight.data.copy_(self.__dict__["_packed"].get(*self.weight.shape))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        packed = self.__dict__.get("_packed")
        if packed is None:
            return super().forward(input)
        return _product(input, self.weight.shape[0], packed.pointer)


class PackedQKV(FusedQKVLinear):
    """TorchTitan's fused projection, packed with the rows of q before those of k and v; the same parameter, same name.

    In TorchTitan's own order each group of heads has its k and v beside it, so that three copies sort the product.
    """

    def packs(self) -> list[nn.Parameter]:
        """The weights that the packed copy is made from."""
        return [self.wqkv.weight]

    def pack(self) -> None:
        """Make the packed copy from the weight as it is now."""
        # Its own forward is not called, so it must have no collective to run.
        assert "forward" not in self.wqkv.__dict__
        weight_FD = self.wqkv.weight.data
        kv = weight_FD.shape[0] // self.r_dim
        sorted_FD = torch.empty_like(weight_FD)
        rows_GRHD = weight_FD.unflatten(0, (-1, self.r_dim, self.head_dim))
        for to_FD, part_GRHD in zip(
            sorted_FD.split([self.heads_per_kv * kv, kv, kv]),
            rows_GRHD.split([self.heads_per_kv, 1, 1], dim=1),
            strict=True,
        ):
            to_FD.view(part_GRHD.shape).copy_(part_GRHD)
        self.__dict__.setdefault("_packed", _Packed()).set(sorted_FD)

    def unpack(self) -> None:
        """Fill the weight from the packed copy; see `PackedLinear.unpack`."""
        weight_FD = self.wqkv.weight.data
        kv = weight_FD.shape[0] // self.r_dim
        parts = self.__dict__["_packed"].get(*weight_FD.shape).split([self.heads_per_kv * kv, kv, kv])
        groups = kv // self.head_dim
        rows_GRHD = torch.cat([part.unflatten(0, (groups, -1, self.head_dim)) for part in parts], dim=1)
        weight_FD.copy_(rows_GRHD.flatten(0, 2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(B, L, D)` to q, k, v of `(B, L, heads, head_dim)`; views of one product."""
        packed = self.__dict__.get("_packed")
        if packed is None:
            return super().forward(x)
        out_features = self.wqkv.weight.shape[0]
        kv = out_features // self.r_dim
        qkv = _product(x, out_features, packed.pointer).split([self.heads_per_kv * kv, kv, kv], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv)
        return q, k, v


class PackedFeedForward(FeedForward):
    """TorchTitan's `FeedForward` with one product for `w1` and `w3`; the same parameters under the same names."""

    def packs(self) -> list[nn.Parameter]:
        """The weights that the packed copy is made from."""
        return [self.w1.weight, self.w3.weight]

    def pack(self) -> None:
        """Make the packed copy of `w1` and `w3` from the weights as they are now; `w2` has its own."""
        # Their own forwards are not called, so they must have no collective to run.
        assert "forward" not in self.w1.__dict__
        assert "forward" not in self.w3.__dict__
        packed = self.__dict__.setdefault("_packed", _Packed())
        packed.set(_joined(self.w1.weight.data, self.w3.weight.data))

    def unpack(self) -> None:
        """Fill `w1` and `w3` from the packed copy; see `PackedLinear.unpack`."""
        hidden, dim = self.w1.weight.shape
        w1_FD, w3_FD = self.__dict__["_packed"].get(2 * hidden, dim).split(hidden)
        self.w1.weight.data.copy_(w1_FD)
        self.w3.weight.data.copy_(w3_FD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., D)` to `(..., D)`."""
        packed = self.__dict__.get("_packed")
        if packed is None:
            return super().forward(x)
        gate, up = _product(x, 2 * self.w1.weight.shape[0], packed.pointer).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)  # vLLM's operator for it is scalar code on the CPU


class PackedExperts(KeepDtypeGroupedExperts):
    """TorchTitan's `GroupedExperts` with packed copies of its weights; the same parameters under the same names.

    Runs inside the opaque operator of routed experts only: it reads counts on the host.
    """

    def packs(self) -> list[nn.Parameter]:
        """The weights that the packed copies are made from."""
        return [self.w1_EFD, self.w2_EDF, self.w3_EFD]

    def pack(self) -> None:
        """Make the packed copies from the weights as they are now; `w1` and `w3` become one product."""
        self.__dict__["_handles"] = [
            (
                ops.create_onednn_mm(torch.cat([w1_FD.data, w3_FD.data]).t(), 32),
                ops.create_onednn_mm(w2_DF.data.t(), 32),
            )
            for w1_FD, w2_DF, w3_FD in zip(self.w1_EFD, self.w2_EDF, self.w3_EFD, strict=True)
        ]

    def unpack(self) -> None:
        """Fill the weights from the packed copies; see `PackedLinear.unpack`."""
        _, hidden, dim = self.w1_EFD.shape
        for expert, (up, down) in enumerate(self.__dict__["_handles"]):
            w1_FD, w3_FD = _plain(up.handler_tensor, 2 * hidden, dim).split(hidden)
            self.w1_EFD.data[expert] = w1_FD
            self.w3_EFD.data[expert] = w3_FD
            self.w2_EDF.data[expert] = _plain(down.handler_tensor, dim, hidden)

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """`(R, D)` to `(R, D)`; rows beyond the sum of the counts get undefined values."""
        handles = self.__dict__.get("_handles")
        if handles is None:
            return super().forward(x_RD, num_tokens_per_expert_E)
        given, x_RD = x_RD, x_RD.to(self.w1_EFD.dtype)
        wide_RF2 = x_RD.new_empty(x_RD.shape[0], 2 * self.w1_EFD.shape[1])
        out_RD = torch.empty_like(x_RD)
        counts = num_tokens_per_expert_E.tolist()
        counts.append(x_RD.shape[0] - sum(counts))  # rows of no expert
        _products(wide_RF2.split(counts), x_RD.split(counts), (up for up, _ in handles))
        gate_RF, up_RF = wide_RF2.chunk(2, dim=-1)
        h_RF = F.silu(gate_RF) * up_RF
        _products(out_RD.split(counts), h_RF.split(counts), (down for _, down in handles))
        return out_RD.type_as(given)


def _products(
    outs: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor], handles: Iterable[ops.CPUDNNLGEMMHandler]
) -> None:
    product = torch.ops._C.onednn_mm.default
    for out, rows, handle in zip(outs, inputs, handles, strict=False):  # `handles` is the shortest
        if rows.shape[0]:
            product(out, rows, None, handle.handler_tensor)


def combine(
    out_RD: torch.Tensor, scores_R: torch.Tensor, tokens_R: torch.Tensor, x_TD: torch.Tensor
) -> torch.Tensor:
    """TorchTitan's `LocalTokenDispatcher.combine`, with its bits; `(T, D)`, and `out_RD` is used up.

    Whole copies of a batch's rows in float32 would be fresh memory each time, which costs more than the products.
    """
    for rows, scores in zip(out_RD.split(_ROWS), scores_R.split(_ROWS), strict=True):
        rows.copy_(rows.float() * scores.unsqueeze(1))
    return torch.zeros_like(x_TD).index_add_(0, tokens_R, out_RD)


_ROWS = 512
"""Rows that are worked on at once: in float32 they stay in the cache."""

Packed = PackedLinear | PackedQKV | PackedFeedForward | PackedExperts


def use_packed_weights(model: nn.Module, dtype: torch.dtype, *, apart: bool = False) -> None:
    """Make TorchTitan's plain linears and routed experts of `model` packed ones; nothing on GPUs and in float32.

    `apart`: each linear layer's own forward is called, and none of several becomes one product.
    """
    if not current_platform.is_cpu() or dtype != torch.bfloat16 or not hasattr(torch.ops._C, "onednn_mm"):
        return
    others: set[nn.Module] = set()  # whose weights the module around them packs or uses
    for module in model.modules():  # parents first
        if type(module) is FeedForward and not apart and module.w1.bias is None and module.w3.bias is None:
            module.__class__ = PackedFeedForward
            others |= {module.w1, module.w3}
        elif type(module) is FusedQKVLinear and not apart and module.wqkv.bias is None:
            module.__class__ = PackedQKV
            others.add(module.wqkv)
        elif type(module) is Linear and module.bias is None and module not in others:
            module.__class__ = PackedLinear
        elif isinstance(module, TokenChoiceTopKRouter):
            others.add(module.gate)  # `Float32Router` multiplies by the weight itself
        elif isinstance(inner := getattr(module, "inner_attention", None), LatentCache):
            others.add(getattr(module, inner.expands))  # vLLM reads the weight itself
        elif type(module) is KeepDtypeGroupedExperts:
            module.__class__ = PackedExperts
