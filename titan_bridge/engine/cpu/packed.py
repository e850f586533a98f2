"""TorchTitan's linears on the CPU backend: bfloat16 products through oneDNN with weights packed beforehand.

`torch.nn.functional.linear` and `torch._grouped_mm` lay a bfloat16 weight out anew at every call, which costs as much
as the product itself at decode sizes; vLLM's own layers pack theirs once, and so do we. The packed copy (in float32
where the processor has no products in bfloat16) follows the plain weight, which loading and transfer write; whether
that stays is `packing`'s matter. float32 models keep torch's own product: it is the referee.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.models.common.attention import FusedQKVLinear
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear, ScaledBiasRowwiseLinear
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from titan_bridge.engine.cpu.onednn import PackedMatrix, packed, product, product_dtype
from titan_bridge.engine.cpu.packed_experts import PackedRoutedExperts, pack_experts
from titan_bridge.engine.log import logger_of
from titan_bridge.engine.model.latent import LatentCache

logger = logger_of(__name__)


def _joined(first_FD: torch.Tensor, second_FD: torch.Tensor) -> torch.Tensor:
    """Both, one under the other: no copy where they lie so in memory."""
    follows = second_FD.data_ptr() == first_FD.data_ptr() + first_FD.nbytes
    if follows and first_FD.untyped_storage().data_ptr() == second_FD.untyped_storage().data_ptr():
        rows = first_FD.shape[0] + second_FD.shape[0]
        return first_FD.as_strided((rows, first_FD.shape[1]), first_FD.stride())
    return torch.cat([first_FD, second_FD])


class _OneMatrix:
    """Of a module whose weights make one packed matrix."""

    def take(self, made: ops.CPUDNNLGEMMHandler) -> None:
        """Compute with what `packed` has made from now on."""
        self.__dict__.setdefault("_packed", PackedMatrix()).take(made)


class PackedLinear(_OneMatrix, Linear):
    """TorchTitan's `Linear` with a packed copy of its weight; the same parameters under the same names."""

    def packs(self) -> list[nn.Parameter]:
        """The weights that the packed copy is made from."""
        return [self.weight]

    def packed(self, weight_FD: torch.Tensor) -> ops.CPUDNNLGEMMHandler:
        """The packed copy of a weight like this module's."""
        return packed(weight_FD)

    def unpack(self) -> None:
        """Fill the weight from the packed copy, which does not tell -0 from 0; a row with an infinity becomes NaN."""
        self.weight.data.copy_(self.__dict__["_packed"].get(*self.weight.shape))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        matrix = self.__dict__.get("_packed")
        if matrix is None:
            return super().forward(input)
        return product(input, self.weight.shape[0], matrix, self._own_bias())

    def _own_bias(self) -> torch.Tensor | None:
        return self.bias


class PackedScaledBiasLinear(PackedLinear, ScaledBiasRowwiseLinear):
    """The same for the linear whose bias is added up over the tp ranks."""

    def _own_bias(self) -> torch.Tensor:
        return self.bias if self.tp_degree == 1 else self.bias / self.tp_degree


class PackedQKV(_OneMatrix, FusedQKVLinear):
    """TorchTitan's fused projection, packed with the rows of q before those of k and v; the same parameter, same name.

    In TorchTitan's own order each group of heads has its k and v beside it, so that three copies sort the product.
    """

    def packs(self) -> list[nn.Parameter]:
        """The weights that the packed copy is made from."""
        return [self.wqkv.weight]

    def packed(self, weight_FD: torch.Tensor) -> ops.CPUDNNLGEMMHandler:
        """The packed copy of a weight like this module's."""
        # Its own forward is not called, so it must have no collective to run.
        assert "forward" not in self.wqkv.__dict__
        kv = weight_FD.shape[0] // self.r_dim
        sorted_FD = torch.empty_like(weight_FD)
        rows_GRHD = weight_FD.unflatten(0, (-1, self.r_dim, self.head_dim))
        for to_FD, part_GRHD in zip(
            sorted_FD.split([self.heads_per_kv * kv, kv, kv]),
            rows_GRHD.split([self.heads_per_kv, 1, 1], dim=1),
            strict=True,
        ):
            to_FD.view(part_GRHD.shape).copy_(part_GRHD)
        return packed(sorted_FD)

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
        matrix = self.__dict__.get("_packed")
        if matrix is None:
            return super().forward(x)
        out_features = self.wqkv.weight.shape[0]
        kv = out_features // self.r_dim
        qkv = product(x, out_features, matrix).split([self.heads_per_kv * kv, kv, kv], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv)
        return q, k, v


class PackedFeedForward(_OneMatrix, FeedForward):
    """TorchTitan's `FeedForward` with one product for `w1` and `w3`; the same parameters under the same names."""

    def packs(self) -> list[nn.Parameter]:
        """The weights that the packed copy is made from."""
        return [self.w1.weight, self.w3.weight]

    def packed(self, w1_FD: torch.Tensor, w3_FD: torch.Tensor) -> ops.CPUDNNLGEMMHandler:
        """The packed copy of weights like `w1` and `w3`; `w2` has its own."""
        # Their own forwards are not called, so they must have no collective to run.
        assert "forward" not in self.w1.__dict__
        assert "forward" not in self.w3.__dict__
        return packed(_joined(w1_FD, w3_FD))

    def unpack(self) -> None:
        """Fill `w1` and `w3` from the packed copy; see `PackedLinear.unpack`."""
        hidden, dim = self.w1.weight.shape
        w1_FD, w3_FD = self.__dict__["_packed"].get(2 * hidden, dim).split(hidden)
        self.w1.weight.data.copy_(w1_FD)
        self.w3.weight.data.copy_(w3_FD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., D)` to `(..., D)`."""
        matrix = self.__dict__.get("_packed")
        if matrix is None:
            return super().forward(x)
        gate, up = product(x, 2 * self.w1.weight.shape[0], matrix).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)  # vLLM's operator for it is scalar code on the CPU


Packed = PackedLinear | PackedQKV | PackedFeedForward | PackedRoutedExperts


def use_packed_weights(
    model: nn.Module, dtype: torch.dtype, *, experts_once: bool = False, apart: bool = False
) -> None:
    """Make TorchTitan's plain linears and routed experts of `model` packed ones; nothing on GPUs and in float32.

    `experts_once`: see `additional_config.titan.cpu_experts_once`. `apart`: each linear layer's own forward is called,
    and none of several becomes one product.
    """
    if not current_platform.is_cpu() or dtype != torch.bfloat16 or product_dtype() is None:
        return
    others: set[nn.Module] = set()  # whose weights the module around them packs or uses
    for module in model.modules():  # parents first
        if type(module) is FeedForward and not apart and module.w1.bias is None and module.w3.bias is None:
            module.__class__ = PackedFeedForward
            others |= {module.w1, module.w3}
        elif type(module) is FusedQKVLinear and not apart and module.wqkv.bias is None:
            module.__class__ = PackedQKV
            others.add(module.wqkv)
        elif type(module) is Linear and module not in others:
            module.__class__ = PackedLinear
        elif type(module) is ScaledBiasRowwiseLinear:
            module.__class__ = PackedScaledBiasLinear
        elif isinstance(module, TokenChoiceTopKRouter):
            others.add(module.gate)  # `Float32Router` multiplies by the weight itself
        elif isinstance(inner := getattr(module, "inner_attention", None), LatentCache):
            others.add(getattr(module, inner.expands))  # vLLM reads the weight itself
        else:
            pack_experts(module, once=experts_once)
    if product_dtype() == torch.float32:
        weights = [weight for m in model.modules() if isinstance(m, Packed) for weight in m.packs()]
        logger.info(
            "This processor has no products in bfloat16: weights are held in float32, which takes %.2f GB more on this "
            "rank, and rounds less",
            sum(weight.nbytes for weight in weights) / 1e9,
        )
    twice = sum(m.bytes_twice() for m in model.modules() if isinstance(m, PackedRoutedExperts))
    if twice:
        logger.info(
            "Routed experts are held in two layouts, which takes %.2f GB more on this rank; "
            "additional_config.titan.cpu_experts_once=true holds one",
            twice / 1e9,
        )
