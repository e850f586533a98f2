"""gpt-oss's routed experts in their weights' dtype; see `experts` for why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, ScaleBiasForward, swiglu

from titan_bridge.models.experts import grouped_product, is_odd


class KeepDtypeGptOssExperts(GptOssGroupedExperts):
    """``GptOssGroupedExperts`` without the cast; same parameters, same names."""

    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):
        pass

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """Expert outputs ``[R, D]`` in ``x_RD``'s dtype; arguments as in ``KeepDtypeGroupedExperts``."""
        w1, b1, w2, b2 = (
            tensor.to_local() if isinstance(tensor, DTensor) else tensor
            for tensor in (self.mlp1_weight_EGD, self.mlp1_bias_EG, self.mlp2_weight_EDF, self.mlp2_bias_ED)
        )
        if w2.dtype == torch.bfloat16 and not is_odd(w2):
            return GptOssGroupedExperts.forward(self, x_RD, num_tokens_per_expert_E).type_as(x_RD)
        ends = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        # Rows beyond the last expert's are undefined; they take its biases.
        rows_R = torch.arange(len(x_RD), dtype=torch.int32, device=ends.device)
        expert_R = torch.searchsorted(ends, rows_R, right=True).clamp(max=len(b1) - 1)
        hidden_RG = grouped_product(self, x_RD.to(w1.dtype), w1, ends) + b1[expert_R]
        hidden_RF = swiglu(hidden_RG, limit=self.swiglu_limit)
        # Where tp ranks add up their outputs, each adds its share of the second bias.
        share_RD = ScaleBiasForward.apply(b2[expert_R], self._tp(), w2.dtype)
        return (grouped_product(self, hidden_RF, w2, ends) + share_RD).type_as(x_RD)

    def _tp(self) -> int:
        weight = self.mlp1_weight_EGD
        if isinstance(weight, DTensor) and "tp" in (weight.device_mesh.mesh_dim_names or ()):
            return weight.device_mesh["tp"].size()
        return 1
