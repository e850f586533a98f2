"""Routed experts by vLLM's Triton kernel, which reads TorchTitan's weights in place.

For GPUs on which `torch._grouped_mm` is a product for each expert that asks the host where its tokens end: those before
Hopper, and consumer Blackwell; and for sizes that it refuses. The kernel asks nothing, so a CUDA graph holds it.
Never run on a GPU here: the tests run the kernel itself, in Triton's interpreter.

Suffixes: T tokens, K experts a token, E this rank's experts, D dim, F hidden, G rows up (2F), R rows sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchtitan.models.common.moe import GroupedExperts
from vllm.model_executor.layers.fused_moe import fused_moe
from vllm.triton_utils import tl

from titan_bridge.models.experts import KeepDtypeExperts, expert_of_rows
from titan_bridge.sharding.layout import dtype_name


class TritonExperts(KeepDtypeExperts):
    """The same parameters under the same names, another way to compute."""

    routes: bool
    """Whether `routed` may be called: not where weights are gathered for each call of the module."""

    def in_one(self, rows_an_expert: float) -> bool:
        """Whether `routed` is the way to compute, whatever the rows an expert."""
        return self.routes

    def routed(
        self, x_TD: torch.Tensor, scores_TK: torch.Tensor, ids_TK: torch.Tensor, *, first: int | None
    ) -> torch.Tensor:
        """Each token's sum over its experts, `(T, D)`.

        `first`: the experts here are this one and those that follow it, and others' part is left out; None: all are.
        """
        own_E = None if first is None else self._own(first, x_TD.device)
        return self._products(x_TD, ids_TK, scores_TK.float().contiguous(), own_E).sum(1)

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """`(R, D)` sorted by expert to `(R, D)`; rows beyond the sum of the counts get undefined values."""
        ends_E = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        ids_R1 = expert_of_rows(ends_E, len(x_RD)).unsqueeze(1)
        return self._products(x_RD, ids_R1, None, None).squeeze(1)

    def _own(self, first: int, device: torch.device) -> torch.Tensor:
        """Where each of the layer's experts is among this rank's; -1: on another rank. Made once."""
        if (own_E := self.__dict__.get("_own_E")) is None:
            own_E = torch.full((self.num_experts,), -1, dtype=torch.int32)
            count = len(self.matrices()[1])
            own_E[first : first + count] = torch.arange(count, dtype=torch.int32)
            self.__dict__["_own_E"] = own_E = own_E.to(device)
        return own_E

    def _products(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        scores_TK: torch.Tensor | None,
        own_E: torch.Tensor | None,
    ) -> torch.Tensor:
        """Every token through each of its experts, times its score: `(T, K, D)`; zero for experts of other ranks."""
        (up, down_EDF), (up_bias, down_bias) = self.matrices(), self.biases()
        tokens, top_k = ids_TK.shape
        count, dim, hidden = down_EDF.shape
        given, x_TD = x_TD, x_TD.to(down_EDF.dtype).contiguous()
        if not tokens:
            return given.new_empty(0, top_k, dim)
        wide = sum(matrix.shape[1] for matrix in up)
        config = fused_moe.try_get_optimal_moe_config(
            (count, wide, dim), (count, dim, hidden), top_k, None, tokens
        )
        places = fused_moe._prepare_expert_assignment(
            ids_TK, config, tokens, top_k, len(own_E) if own_E is not None else count, own_E,
            ignore_invalid_experts=True,
        )  # fmt: skip

        def multiply(
            x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None,
            scores: torch.Tensor | None, top_k: int,
        ) -> None:  # fmt: skip
            fused_moe.invoke_fused_moe_triton_kernel(
                x, weight, out, None, None, scores, *places, scores is not None, top_k, config,
                compute_type=getattr(tl, dtype_name(weight.dtype)), B_bias=bias, **_NOT_QUANTIZED,
            )  # fmt: skip

        wide_TKG, at = x_TD.new_empty(tokens, top_k, wide), 0
        for matrix in up:
            rows = slice(at, at := at + matrix.shape[1])
            multiply(x_TD, matrix, wide_TKG[..., rows], up_bias, None, top_k)
        hidden_RF = self.activate(wide_TKG.flatten(0, 1))
        # Nobody writes the rows of other ranks' experts.
        out_TKD = (x_TD.new_empty if own_E is None else x_TD.new_zeros)(tokens, top_k, dim)
        multiply(hidden_RF, down_EDF, out_TKD, down_bias, scores_TK, 1)
        return out_TKD.type_as(given)


_NOT_QUANTIZED: dict[str, Any] = dict.fromkeys(
    ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant"), False
)


def can_use_triton(config: GroupedExperts.Config) -> bool:
    """Whether experts of this config can be computed so."""
    return config._owner is not None and issubclass(config._owner, KeepDtypeExperts)


def use_triton(module: nn.Module, *, routes: bool) -> None:
    """Let experts of a config that can be computed so be, in place."""
    kind = type(module)
    module.__class__ = type(f"Triton{kind.__name__}", (TritonExperts, kind), {})
    assert isinstance(module, TritonExperts)
    module.routes = routes
