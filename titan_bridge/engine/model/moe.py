"""Routed experts inside vLLM as one opaque operator: TorchTitan's own dispatch and grouped matmul, or vLLM's kernels.

The operator is opaque because what happens inside depends on the data (how many tokens go to which expert),
which torch.compile cannot capture. Where the body reads counts on the host, a CUDA graph cannot either, and vLLM's
compiler splits its graph there. The operator writes into an `out` that the piece before it allocates, as vLLM's
attention does: a graph replays with the addresses it was captured with, so the next piece would never see a tensor
that is allocated between two graphs.

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
from torchtitan.models.common.token_dispatcher import (
    AllToAllDispatchMetadata,
    AllToAllTokenDispatcher,
    LocalDispatchMetadata,
    LocalTokenDispatcher,
)
from vllm.config import CompilationConfig
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from titan_bridge.engine.cpu.packed_experts import PackedRoutedExperts, combine
from titan_bridge.engine.model.triton_experts import TritonExperts


class TopKSumDispatcher(LocalTokenDispatcher):
    """Combines by adding a token's K rows, with the bits of TorchTitan's scatter-add.

    TorchTitan's deterministic scatter-add sorts an index for every element on a GPU, and synchronises.
    """

    def combine(
        self,
        routed_output_RD: torch.Tensor,
        metadata: LocalDispatchMetadata | _OwnMetadata,
        x_TD: torch.Tensor,
    ) -> torch.Tensor:
        """Weight the rows and add those of each token, `(N, D)` to `(T, D)`; here every routed token has a row."""
        return self._sum(routed_output_RD, metadata, x_TD, None)

    def _sum(
        self,
        rows_ND: torch.Tensor,
        metadata: LocalDispatchMetadata | _OwnMetadata,
        x_TD: torch.Tensor,
        n_own: torch.Tensor | None,
    ) -> torch.Tensor:
        """`combine`, with a row of each token in memory at a time; rows from `n_own` on may hold anything and count as
        zero."""
        # Stable, so that a token's rows are added in the order of experts, as they come in `rows_ND`.
        places_N = torch.argsort(metadata.token_indices_experts_sorted_N, stable=True)
        sum_TD: torch.Tensor | None = None
        for places_T in places_N.view(len(x_TD), self.top_k).unbind(1):
            scores_T1 = metadata.topk_scores_experts_sorted_N[places_T].unsqueeze(1)
            row_TD = rows_ND[places_T].float().mul_(scores_T1)
            if n_own is not None:
                row_TD.masked_fill_((places_T >= n_own).unsqueeze(1), 0)
            row_TD = row_TD.to(rows_ND.dtype)
            sum_TD = row_TD.float() if sum_TD is None else sum_TD.add_(row_TD)
        assert sum_TD is not None, "a token has an expert"
        return sum_TD.to(x_TD.dtype)


class SpreadDispatcher(AllToAllTokenDispatcher, TopKSumDispatcher):
    """TorchTitan's all-to-all with the combine of `TopKSumDispatcher`."""

    def combine(
        self, routed_output_RD: torch.Tensor, metadata: AllToAllDispatchMetadata, x_TD: torch.Tensor
    ) -> torch.Tensor:
        """Bring the experts' outputs back and add those of each token, `(R, D)` to `(T, D)`."""
        assert self.ep_mesh is not None
        routed_RD = self._unpermute(routed_output_RD, metadata.input_shape, metadata.permuted_indices)
        routed_ND = self._combine_token_exchange(
            routed_RD, self.ep_mesh.get_group(), metadata.input_splits, metadata.output_splits
        )
        return TopKSumDispatcher.combine(self, routed_ND, metadata, x_TD)


@dataclass(frozen=True, kw_only=True)
class _OwnMetadata:
    token_indices_experts_sorted_N: torch.Tensor  # TorchTitan's names; its `combine` reads them
    topk_scores_experts_sorted_N: torch.Tensor
    n_own: torch.Tensor
    """Routed tokens of this rank's experts, scalar int64; they come first in the sorted order."""


class OwnExpertsDispatcher(TopKSumDispatcher):
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
        """Add the own experts' outputs; rows of other experts hold nothing and count as zero."""
        return self._sum(routed_output_RD, metadata, x_TD, metadata.n_own)


class ServedExperts(nn.Module):
    """Runs a TorchTitan `RoutedExperts`; compiled steps call it by the operator `torch.ops.vllm.titan_routed_experts`.

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
        token_share: tuple[int, int] | None,
        outside_graphs: bool,
        compilation: CompilationConfig,
        reports: bool = False,
    ) -> None:
        """`name` is unique in the model; `outside_graphs`: no CUDA graph holds it; `reports`: `capture_fn` will be set.

        `token_share` takes the all-to-all way: position on the tp axis and its size, by which ranks share tokens out.
        """
        super().__init__()
        self.name, self.layer_id, self.token_share = name, layer_id, token_share
        self.capture_fn: Callable[[torch.Tensor], None] | None = None
        self.reports = reports
        self.inner_experts = experts.inner_experts
        self.token_dispatcher = experts.token_dispatcher
        compilation.static_forward_context[name] = self
        if outside_graphs and compilation.splitting_ops is not None and OP not in compilation.splitting_ops:
            compilation.splitting_ops.append(OP)

    def forward(
        self,
        x_BLD: torch.Tensor,
        topk_scores_BLK: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> torch.Tensor:
        """`(B, L, D)` in, `(B, L, D)` out, same dtype; arguments as `RoutedExperts.forward`."""
        x_TD, scores_TK, ids_TK = (t.flatten(0, 1) for t in (x_BLD, topk_scores_BLK, topk_expert_ids_BLK))
        if not torch.compiler.is_compiling():
            return self.run(x_TD, scores_TK, ids_TK, num_local_tokens_per_expert_E).view_as(x_BLD)
        if self._is_one_operator():
            return self.inner_experts.routed(x_TD, scores_TK, ids_TK, first=None).view_as(x_BLD)
        out_BLD = torch.empty_like(x_BLD)
        torch.ops.vllm.titan_routed_experts(
            x_TD, scores_TK, ids_TK, num_local_tokens_per_expert_E, out_BLD.view_as(x_TD), self.name
        )
        return out_BLD

    def _is_one_operator(self) -> bool:
        """Whether they are one operator of vLLM's whatever the tokens are, which a compiled step calls itself."""
        packed = isinstance(self.inner_experts, PackedRoutedExperts) and self.inner_experts.in_one(
            float("inf")
        )
        all_here = getattr(self.token_dispatcher, "first", None) is None
        unseen = self.capture_fn is None and not self.reports
        return packed and all_here and unseen and self.token_share is None

    def run(
        self, x_TD: torch.Tensor, scores_TK: torch.Tensor, ids_TK: torch.Tensor, count_E: torch.Tensor
    ) -> torch.Tensor:
        """The body of the operator; returns this rank's part of the sum, `(T, D)`."""
        if self.capture_fn is not None:
            self.capture_fn(ids_TK)
        if self.token_share is None:
            return self._compute(x_TD, scores_TK, ids_TK, count_E)
        rank, tp = self.token_share
        start, stop = (len(x_TD) * r // tp for r in (rank, rank + 1))
        out_TD = torch.zeros_like(x_TD)
        share = slice(start, stop)
        # Not bincount, which asks a GPU for the largest id; a token has an expert once.
        chosen_TE = torch.zeros(stop - start, len(count_E), dtype=torch.bool, device=x_TD.device)
        count_E = chosen_TE.scatter_(1, ids_TK[share], True).sum(0)
        out_TD[share] = self._compute(x_TD[share], scores_TK[share], ids_TK[share], count_E)
        return out_TD

    def _compute(
        self, x_TD: torch.Tensor, scores_TK: torch.Tensor, ids_TK: torch.Tensor, count_E: torch.Tensor
    ) -> torch.Tensor:
        experts = self.inner_experts
        routes = self.token_share is None and isinstance(experts, PackedRoutedExperts | TritonExperts)
        if routes and experts.in_one(ids_TK.numel() / len(count_E)):
            first = getattr(self.token_dispatcher, "first", None)
            return experts.routed(x_TD, scores_TK, ids_TK, first=first)
        packed = routes and isinstance(experts, PackedRoutedExperts)
        # Packed experts ask the host anyway, so rows can be gathered when it is known how many this rank needs.
        given_TD = x_TD[:, :0] if packed else x_TD
        routed_RD, count_e, metadata = self.token_dispatcher.dispatch(given_TD, scores_TK, ids_TK, count_E)
        if packed:
            own = slice(int(count_e.sum()))
            tokens_R = metadata.token_indices_experts_sorted_N[own]
            out_RD = experts(x_TD[tokens_R], count_e)
            return combine(out_RD, metadata.topk_scores_experts_sorted_N[own], tokens_R, x_TD)
        # Called without a token, too: its weights may be gathered over efsdp, which every rank must join.
        out_RD = experts(routed_RD, count_e)
        return self.token_dispatcher.combine(out_RD, metadata, x_TD)


OP = "vllm::titan_routed_experts"


def _routed_experts(
    x_TD: torch.Tensor,
    scores_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    count_E: torch.Tensor,
    out_TD: torch.Tensor,
    name: str,
) -> None:
    out_TD.copy_(get_forward_context().no_compile_layers[name].run(x_TD, scores_TK, ids_TK, count_E))


direct_register_custom_op(
    "titan_routed_experts",
    _routed_experts,
    mutates_args=["out_TD"],
    fake_impl=lambda *args, **kwargs: None,  # it returns nothing
)
