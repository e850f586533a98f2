"""gpt-oss's routed experts in their weights' dtype; see `experts` for why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.distributed import ParallelDims
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, ScaleBiasForward, swiglu

from titan_bridge.models.experts import KeepDtypeExperts, expert_of_rows, grouped_product, local


class KeepDtypeGptOssExperts(KeepDtypeExperts, GptOssGroupedExperts):
    """``GptOssGroupedExperts`` without the cast; same parameters, same names."""

    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):
        pass

    tp_degree = 1
    """Ranks whose outputs are added up, so that each adds its share of the second bias."""

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        # Over ep every rank computes whole experts.
        self.tp_degree = parallel_dims.tp if parallel_dims.ep == 1 else 1
        super().parallelize(parallel_dims)

    def matrices(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        # Gate and up are alternate rows of one matrix.
        return [local(self.mlp1_weight_EGD)], local(self.mlp2_weight_EDF)

    def biases(self) -> tuple[torch.Tensor, torch.Tensor]:
        down_ED = local(self.mlp2_bias_ED)
        return local(self.mlp1_bias_EG), down_ED if self.tp_degree == 1 else down_ED / self.tp_degree

    def activate(self, wide_RG: torch.Tensor) -> torch.Tensor:
        return swiglu(wide_RG, limit=self.swiglu_limit)

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """Expert outputs ``[R, D]`` in ``x_RD``'s dtype; arguments as in ``KeepDtypeGroupedExperts``."""
        ((w1,), w2), b1, b2 = self.matrices(), local(self.mlp1_bias_EG), local(self.mlp2_bias_ED)
        ends = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        # Rows beyond the last expert's are undefined; they take its biases.
        expert_R = expert_of_rows(ends, len(x_RD))
        hidden_RF = self.activate(grouped_product(self, x_RD.to(w1.dtype), w1, ends) + b1[expert_R])
        share_RD = ScaleBiasForward.apply(b2[expert_R], self.tp_degree, w2.dtype)
        return (grouped_product(self, hidden_RF, w2, ends) + share_RD).type_as(x_RD)
