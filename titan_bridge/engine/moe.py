"""Routed experts inside vLLM: TorchTitan's own dispatch and grouped matmul as one opaque operator.

The operator is opaque because what happens inside depends on the data (how many tokens go to which expert),
which neither torch.compile nor a CUDA graph can capture; vLLM's compiler splits its graph there.

Every rank of a tp group sees the same tokens. Two ways to spread them over experts:

- `ep == tp` and no data parallelism: each rank computes its own experts for all tokens and the tp all-reduce
  that follows the MoE block anyway adds them up. No all-to-all, no host synchronisation.
- otherwise: each rank of a tp group takes its share of the tokens and TorchTitan's all-to-all dispatcher
  carries them to the experts' ranks and back. Shares may differ in size or be empty, so no token is padded.

Shape suffixes as in `torchtitan/models/common/moe.py`: T tokens, D dim, K top-k, E experts, e local experts,
N = T * K routed tokens, R routed tokens on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
from vllm.config import CompilationConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from titan_bridge.engine.cpu_packed import PackedExperts, combine


@dataclass(frozen=True, kw_only=True)
class _OwnMetadata:
    token_indices_experts_sorted_N: torch.Tensor  # TorchTitan's names; its `combine` reads them
    topk_scores_experts_sorted_N: torch.Tensor
    n_own: torch.Tensor
    """Routed tokens of this rank's experts, scalar int64; they come first in the sorted order."""


class OwnExpertsDispatcher(LocalTokenDispatcher):
    """Sees all tokens, computes those of the experts `[first, first + count)`, leaves zero for the others."""

    def __init__(self, dispatcher: LocalTokenDispatcher, *, first: int, count: int) -> None:
        super().__init__(
            LocalTokenDispatcher.Config(num_experts=dispatcher.num_experts, top_k=dispatcher.top_k)
        )
        self.first, self.count = first, count

    def dispatch(
        self,
        x_TD: torch.Tensor,
        topk_scores_TK: torch.Tensor,
        topk_expert_ids_TK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, _OwnMetadata]:
        """Sort tokens by expert with this rank's experts first; shapes do not depend on the data."""
        ids_TK = topk_expert_ids_TK - self.first
        ids_TK = torch.where((ids_TK >= 0) & (ids_TK < self.count), ids_TK, self.count)
        routed_ND, tokens_N, scores_N = self._local_reorder(x_TD, topk_scores_TK, ids_TK)
        count_e = num_local_tokens_per_expert_E[self.first : self.first + self.count]
        metadata = _OwnMetadata(
            token_indices_experts_sorted_N=tokens_N,
            topk_scores_experts_sorted_N=scores_N,
            n_own=count_e.sum(),
        )
        return routed_ND, count_e, metadata

    def combine(
        self, routed_output_RD: torch.Tensor, metadata: _OwnMetadata, x_TD: torch.Tensor
    ) -> torch.Tensor:
        """Scatter the own experts' outputs back; rows of other experts hold nothing and count as zero."""
        own_N1 = (torch.arange(len(routed_output_RD), device=x_TD.device) < metadata.n_own).unsqueeze(1)
        return super().combine(torch.where(own_N1, routed_output_RD, 0), metadata, x_TD)


class ServedExperts(nn.Module):
    """Runs a TorchTitan `RoutedExperts` through the opaque operator `torch.ops.vllm.titan_routed_experts`.

    Output on each tp rank is a partial sum (`P` on tp), which the MoE block's declared boundary reduces.

    It is a `RoutedExpertsCaptureSource` of vLLM's: `enable_return_routed_experts` finds it by `layer_id` and
    `capture_fn`, and a trainer that replays the routing gets the experts that TorchTitan's router chose here.
    """

    def __init__(
        self,
        experts: RoutedExperts,
        *,
        name: str,
        layer_id: int,
        spread: bool,
        splits: bool,
        compilation: CompilationConfig,
    ) -> None:
        """`name` is unique in the model; `spread` takes the all-to-all way; `splits` keeps it out of CUDA graphs."""
        super().__init__()
        self.name, self.layer_id, self.spread = name, layer_id, spread
        self.capture_fn: Callable[[torch.Tensor], None] | None = None
        self.inner_experts = experts.inner_experts
        self.token_dispatcher = experts.token_dispatcher
        compilation.static_forward_context[name] = self
        if splits and compilation.splitting_ops is not None and OP not in compilation.splitting_ops:
            compilation.splitting_ops.append(OP)

    def forward(
        self,
        x_BLD: torch.Tensor,
        topk_scores_BLK: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> torch.Tensor:
        """`(B, L, D)` in, `(B, L, D)` out, same dtype; arguments as `RoutedExperts.forward`."""
        out_TD = torch.ops.vllm.titan_routed_experts(
            x_BLD.flatten(0, 1), topk_scores_BLK.flatten(0, 1), topk_expert_ids_BLK.flatten(0, 1),
            num_local_tokens_per_expert_E, self.name,
        )  # fmt: skip
        return out_TD.view(x_BLD.shape)

    def run(
        self, x_TD: torch.Tensor, scores_TK: torch.Tensor, ids_TK: torch.Tensor, count_E: torch.Tensor
    ) -> torch.Tensor:
        """The body of the operator; returns this rank's part of the sum, `(T, D)`."""
        if self.capture_fn is not None:
            self.capture_fn(ids_TK)
        if not self.spread:
            return self._compute(x_TD, scores_TK, ids_TK, count_E)
        tp, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        start, stop = (len(x_TD) * r // tp for r in (rank, rank + 1))
        out_TD = torch.zeros_like(x_TD)
        share = slice(start, stop)
        count_E = torch.bincount(ids_TK[share].flatten(), minlength=len(count_E))
        out_TD[share] = self._compute(x_TD[share], scores_TK[share], ids_TK[share], count_E)
        return out_TD

    def _compute(
        self, x_TD: torch.Tensor, scores_TK: torch.Tensor, ids_TK: torch.Tensor, count_E: torch.Tensor
    ) -> torch.Tensor:
        packed = isinstance(self.inner_experts, PackedExperts) and not self.spread
        # Packed experts ask the host anyway, so rows can be gathered when it is known how many this rank needs.
        given_TD = x_TD[:, :0] if packed else x_TD
        routed_RD, count_e, metadata = self.token_dispatcher.dispatch(given_TD, scores_TK, ids_TK, count_E)
        if packed:
            own = slice(int(count_e.sum()))
            tokens_R = metadata.token_indices_experts_sorted_N[own]
            out_RD = self.inner_experts(x_TD[tokens_R], count_e)
            return combine(out_RD, metadata.topk_scores_experts_sorted_N[own], tokens_R, x_TD)
        # Called without a token, too: its weights may be gathered over efsdp, which every rank must join.
        out_RD = self.inner_experts(routed_RD, count_e)
        return self.token_dispatcher.combine(out_RD, metadata, x_TD)


OP = "vllm::titan_routed_experts"


def _routed_experts(
    x_TD: torch.Tensor, scores_TK: torch.Tensor, ids_TK: torch.Tensor, count_E: torch.Tensor, name: str
) -> torch.Tensor:
    return get_forward_context().no_compile_layers[name].run(x_TD, scores_TK, ids_TK, count_E)


def _routed_experts_fake(
    x_TD: torch.Tensor, scores_TK: torch.Tensor, ids_TK: torch.Tensor, count_E: torch.Tensor, name: str
) -> torch.Tensor:
    return torch.empty_like(x_TD)


direct_register_custom_op("titan_routed_experts", _routed_experts, fake_impl=_routed_experts_fake)
