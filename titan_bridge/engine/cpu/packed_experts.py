"""Routed experts on the CPU backend: vLLM's one operator for all experts of a layer, and a product for each expert.

The operator sorts tokens, multiplies, applies the activation and adds up in one call. With AMX it is the fastest at
every size, and its layout is the only one that is held; so it is where oneDNN has no products in bfloat16. Between
these, it wins while experts have few rows, and a oneDNN product for each expert wins above: experts are then held in
both layouts, which doubles their memory, or with `cpu_experts_once` in oneDNN's alone.

Suffixes: T tokens, K experts a token, R rows of this rank's experts, E its experts, D dim, F hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

from titan_bridge.engine.cpu.onednn import packed, plain, product_dtype
from titan_bridge.models.experts import KeepDtypeExperts, KeepDtypeGroupedExperts
from titan_bridge.models.gpt_oss_experts import KeepDtypeGptOssExperts

FEW_ROWS = 4
"""Rows an expert up to which the operator beats a product for each expert, without AMX."""

FEW_FOREIGN = range(16, 65)
"""Chosen experts of all tokens in a step where, with AMX, computing others' rows costs less than picking one's own:
measured so at 32 and 64; at 4 and 128 picking cost less."""


def isa_for(sizes: Iterable[int]) -> str | None:
    """Which of its layouts vLLM's operator takes here for experts with these widths in bfloat16; None: none.

    vLLM's own classes know processors and alignments; the portable one comes last.
    """
    kinds = (
        cpu_moe.X86CPUUnquantizedExperts,
        cpu_moe.ArmCPUUnquantizedExperts,
        cpu_moe.PowerCPUUnquantizedExperts,
        cpu_moe.CPUUnquantizedExperts,
    )
    sizes = tuple(sizes)
    for kind in kinds:
        multiple = kind._intermediate_alignment()
        if kind._supports_current_device() and not any(size % multiple for size in sizes):
            return kind.isa
    return None


class _Matrices:
    """One matrix of each expert, `(rows, columns)` bfloat16, in a layout of vLLM's operator, in `product_dtype`."""

    def __init__(self, isa: str, shape_ERC: Sequence[int], matrices: Iterable[torch.Tensor]) -> None:
        self.isa = isa
        self.packed = torch.empty(*shape_ERC, dtype=product_dtype())
        for matrix_RC, packed_RC in zip(matrices, self.packed, strict=True):
            given_RC = matrix_RC.to(self.packed.dtype).contiguous()
            torch.ops._C.prepack_moe_weight(given_RC[None], packed_RC[None], self.isa)

    def get(self, expert: int) -> torch.Tensor:
        """What was packed, bit for bit."""
        packed_RC = self.packed[expert]
        plain_RC = torch.empty(packed_RC.shape, dtype=torch.bfloat16)
        places = _sources(*packed_RC.shape, self.isa, packed_RC.dtype)
        plain_RC.view(-1)[places] = packed_RC.view(-1).to(torch.bfloat16)
        return plain_RC


@cache
def _sources(rows: int, columns: int, isa: str, dtype: torch.dtype) -> torch.Tensor:
    """Where each element of a packed matrix was: found by packing the positions, 15 bits at a time."""
    index_RC = torch.arange(rows * columns).view(1, rows, columns)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    found = torch.zeros(rows * columns, dtype=torch.int64)
    for shift in (0, 15):
        part_RC = (index_RC >> shift & 0x7FFF).to(integer).view(dtype)
        packed_RC = torch.empty_like(part_RC)
        torch.ops._C.prepack_moe_weight(part_RC, packed_RC, isa)
        found |= packed_RC.view(integer).view(-1).long() << shift
    return found


class PackedRoutedExperts(KeepDtypeExperts):
    """What both kinds of experts share. They run inside the opaque operator of routed experts only: they read counts.

    A kind says which weights make a matrix up, `(2F, D)`, and one down, `(D, F)`, for each expert.
    """

    activation: str
    isa: str | None
    """The operator's layout; None: it is not held."""
    products: bool
    """Whether oneDNN's layout is held."""

    def packs(self) -> list[nn.Parameter]:
        """The weights that the packed copies are made from."""
        raise NotImplementedError

    def unpack(self) -> None:
        """Fill the weights from the packed copies; oneDNN's have 0 for -0 and NaN in a row with an infinity."""
        raise NotImplementedError

    def _sizes(self) -> tuple[int, int, int]:
        """Experts, hidden size, dim."""
        raise NotImplementedError

    def _matrices(self, *weights: torch.Tensor) -> tuple[Iterator[torch.Tensor], Iterator[torch.Tensor]]:
        """Up and down, of each expert."""
        raise NotImplementedError

    def packed(self, *weights: torch.Tensor) -> dict[str, Any]:
        """The packed copies of weights like those of `packs`."""
        count, hidden, dim = self._sizes()
        made: dict[str, Any] = {}
        if self.isa is not None:
            if self.isa == "amx":
                torch.cpu._init_amx()  # asks Linux for the registers, which the operator does not
            made["_packed"] = tuple(
                _Matrices(self.isa, shape, matrices)
                for shape, matrices in zip(
                    ((count, 2 * hidden, dim), (count, dim, hidden)), self._matrices(*weights), strict=True
                )
            )
        if self.products:
            made["_handles"] = [
                (packed(up_FD), packed(down_DF))
                for up_FD, down_DF in zip(*self._matrices(*weights), strict=True)
            ]
        return made

    def take(self, made: dict[str, Any]) -> None:
        """Compute with what `packed` has made from now on."""
        self.__dict__.update(made)

    def _unpacked(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each expert's two matrices, read back."""
        count, hidden, dim = self._sizes()
        for expert in range(count):
            if self.isa is not None:
                up, down = self.__dict__["_packed"]
                yield up.get(expert), down.get(expert)
            else:
                up, down = self.__dict__["_handles"][expert]
                yield plain(up.handler_tensor, 2 * hidden, dim), plain(down.handler_tensor, dim, hidden)

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """`(R, D)` sorted by expert to `(R, D)`; rows beyond the sum of the counts get undefined values."""
        if self.__dict__.keys().isdisjoint(("_packed", "_handles")):
            return super().forward(x_RD, num_tokens_per_expert_E)
        given, x_RD = x_RD, x_RD.to(torch.bfloat16)
        if self.in_one(len(x_RD) / len(num_tokens_per_expert_E)):
            out_RD = torch.empty_like(x_RD)
            experts = torch.arange(len(num_tokens_per_expert_E), dtype=torch.int32)
            ids_R1 = experts.repeat_interleave(num_tokens_per_expert_E).unsqueeze(1)
            own = slice(len(ids_R1))
            out_RD[own] = self._operate(x_RD[own], torch.ones(ids_R1.shape), ids_R1)
        else:
            out_RD = self._each(x_RD, num_tokens_per_expert_E.tolist())
        return out_RD.type_as(given)

    def bytes_twice(self) -> int:
        """Of the layout that is held beside another one."""
        twice = self.isa is not None and self.products
        return sum(weight.nbytes for weight in self.packs()) if twice else 0

    def in_one(self, rows_an_expert: float) -> bool:
        """Whether vLLM's operator is the faster one for so many rows an expert."""
        return "_packed" in self.__dict__ and (not self.products or rows_an_expert <= FEW_ROWS)

    def routed(
        self, x_TD: torch.Tensor, scores_TK: torch.Tensor, ids_TK: torch.Tensor, *, first: int | None
    ) -> torch.Tensor:
        """Each token's sum over its experts in one operator, `(T, D)`.

        `first`: the experts here are this one and those that follow it, and others' part is left out; None: all are.
        """
        if first is None:
            return self._operate(x_TD, scores_TK, ids_TK)
        nearest_TK = ids_TK.clamp(first, first + self._sizes()[0] - 1)
        own_TK = nearest_TK == ids_TK
        if self.isa == "amx" and ids_TK.numel() in FEW_FOREIGN:
            # Rows of others' experts go through this rank's first or last, with a score of 0.
            return self.routed(x_TD, scores_TK * own_TK, nearest_TK - first, first=None)
        places_R = own_TK.flatten().nonzero().squeeze(1)
        tokens_R = places_R // ids_TK.shape[1]
        x_RD = x_TD.index_select(0, tokens_R)
        scores_R1, ids_R1 = (
            each_TK.flatten().index_select(0, places_R).unsqueeze(1) for each_TK in (scores_TK, ids_TK)
        )
        out_RD = self._operate(x_RD, scores_R1, ids_R1 - first)
        return torch.zeros_like(x_TD).index_add_(0, tokens_R, out_RD)

    def _operate(self, x_TD: torch.Tensor, scores_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        assert self.isa is not None
        up, down = self.__dict__["_packed"]
        # The operator reads without regard to strides and types.
        given, x_TD = x_TD, x_TD.to(up.packed.dtype).contiguous()
        out_TD = torch.empty_like(x_TD)
        ops.cpu_fused_moe(
            out_TD, x_TD, up.packed, down.packed, *self._biases_in(x_TD.dtype),
            scores_TK.float().contiguous(), ids_TK.to(torch.int32).contiguous(), self.activation, self.isa,
        )  # fmt: skip
        return out_TD.type_as(given)

    def _biases_in(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        return [None if bias is None else bias.to(dtype) for bias in self.biases()]

    def _each(self, x_RD: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """A product for each expert."""
        hidden = self._sizes()[1]
        handles = self.__dict__["_handles"]
        x_RD = x_RD.to(product_dtype())
        up_bias, down_bias = self._biases_in(x_RD.dtype)
        wide_RF2, out_RD = x_RD.new_empty(len(x_RD), 2 * hidden), torch.empty_like(x_RD)
        counts = [*counts, len(x_RD) - sum(counts)]  # rows of no expert
        _products(wide_RF2.split(counts), x_RD.split(counts), [up for up, _ in handles], up_bias)
        h_RF = self.activate(wide_RF2)
        _products(out_RD.split(counts), h_RF.split(counts), [down for _, down in handles], down_bias)
        return out_RD


def _products(
    outs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    handles: Sequence[ops.CPUDNNLGEMMHandler],
    bias_EN: torch.Tensor | None,
) -> None:
    product = torch.ops._C.onednn_mm.default
    for expert, handle in enumerate(handles):
        if inputs[expert].shape[0]:
            bias = None if bias_EN is None else bias_EN[expert]
            product(outs[expert], inputs[expert], bias, handle.handler_tensor)


class PackedExperts(PackedRoutedExperts, KeepDtypeGroupedExperts):
    """TorchTitan's `GroupedExperts` with packed copies of its weights; the same parameters under the same names."""

    activation = "silu"

    def packs(self) -> list[nn.Parameter]:
        return [self.w1_EFD, self.w2_EDF, self.w3_EFD]

    def unpack(self) -> None:
        for expert, (wide, tall) in enumerate(self._unpacked()):
            w1, w3 = wide.chunk(2)
            self.w1_EFD.data[expert], self.w3_EFD.data[expert], self.w2_EDF.data[expert] = w1, w3, tall

    def _sizes(self) -> tuple[int, int, int]:
        count, hidden, dim = self.w1_EFD.shape
        return count, hidden, dim

    def _matrices(self, *weights: torch.Tensor) -> tuple[Iterator[torch.Tensor], Iterator[torch.Tensor]]:
        w1_EFD, w2_EDF, w3_EFD = weights
        return (torch.cat(pair) for pair in zip(w1_EFD, w3_EFD, strict=True)), iter(w2_EDF)


class PackedGptOssExperts(PackedRoutedExperts, KeepDtypeGptOssExperts):
    """The same for gpt-oss: gate and up in alternate rows, biases, a clamped activation. Biases stay plain."""

    activation = "swigluoai"

    def packs(self) -> list[nn.Parameter]:
        return [self.mlp1_weight_EGD, self.mlp2_weight_EDF]

    def unpack(self) -> None:
        for expert, (wide, tall) in enumerate(self._unpacked()):
            self.mlp1_weight_EGD.data[expert], self.mlp2_weight_EDF.data[expert] = wide, tall

    def _sizes(self) -> tuple[int, int, int]:
        count, dim, hidden = self.mlp2_weight_EDF.shape
        return count, hidden, dim

    def _matrices(self, *weights: torch.Tensor) -> tuple[Iterator[torch.Tensor], Iterator[torch.Tensor]]:
        mlp1_EGD, mlp2_EDF = weights
        return iter(mlp1_EGD), iter(mlp2_EDF)


def layouts_for(sizes: Iterable[int], *, once: bool) -> tuple[str | None, bool]:
    """Which layout of vLLM's operator to hold for experts with these widths, if any, and whether to hold oneDNN's.

    `once`: one of them, which is oneDNN's where both are of use.
    """
    isa = isa_for(sizes)
    if isa == "amx" or (isa is not None and product_dtype() != torch.bfloat16):
        return isa, False
    return None if once else isa, True


def pack_experts(
    module: nn.Module, *, once: bool = False, layouts: tuple[str | None, bool] | None = None
) -> bool:
    """Make `module` a packed one in place, if it is routed experts of ours.

    `layouts`: other ones than those of `layouts_for` for this processor.
    """
    if type(module) is KeepDtypeGroupedExperts:
        module.__class__ = PackedExperts
    elif type(module) is KeepDtypeGptOssExperts and module.swiglu_limit == 7.0:  # what the operator computes
        module.__class__ = PackedGptOssExperts
    else:
        return False
    assert isinstance(module, PackedRoutedExperts)
    module.isa, module.products = layouts or layouts_for(module._sizes()[1:], once=once)
    return True


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
