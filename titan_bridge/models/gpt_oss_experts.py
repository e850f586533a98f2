"""gpt-oss's routed experts in their weights' dtype; see `experts` for why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, ScaleBiasForward, swiglu

from titan_bridge.models.experts import grouped_product


class KeepDtypeGptOssExperts(GptOssGroupedExperts):
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

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """Expert outputs ``[R, D]`` in ``x_RD``'s dtype; arguments as in ``KeepDtypeGroupedExperts``."""
        w1, b1, w2, b2 = (
            tensor.to_local() if isinstance(tensor, DTensor) else tensor
            for tensor in (self.mlp1_weight_EGD, self.mlp1_bias_EG, self.mlp2_weight_EDF, self.mlp2_bias_ED)
        )
        ends = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        # Rows beyond the last expert's are undefined; they take its biases.
        rows_R = torch.arange(len(x_RD), dtype=torch.int32, device=ends.device)
        expert_R = torch.searchsorted(ends, rows_R, right=True).clamp(max=len(b1) - 1)
        hidden_RG = grouped_product(self, x_RD.to(w1.dtype), w1, ends) + b1[expert_R]
        hidden_RF = swiglu(hidden_RG, limit=self.swiglu_limit)
        share_RD = ScaleBiasForward.apply(b2[expert_R], self.tp_degree, w2.dtype)
        return (grouped_product(self, hidden_RF, w2, ends) + share_RD).type_as(x_RD)
