"""TorchTitan's router with its gate in explicit float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchtitan.models.common.moe import TokenChoiceTopKRouter


class Float32Router(TokenChoiceTopKRouter):
    """`TokenChoiceTopKRouter` whose forward asks for no autocast, with the bits of the autocast where that is on.

    vLLM's compiler cannot split a graph at operators between entering and leaving autocast, and torch has no key
    under which it could keep a graph with one. On CPUs torch turns TorchTitan's autocast to float32 off, with a
    warning; here the gate is float32 there, too.
    """

    def forward(
        self, x_BLD: torch.Tensor, expert_bias_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(B, L, D)` to scores `(B, L, K)` float32, expert ids `(B, L, K)` int64, all scores `(B, L, E)`.

        Follows TorchTitan 0.3.0 line by line but for the gate.
        """
        gate = self.gate
        bias = None if gate.bias is None else gate.bias.float()
        logits_BLE = F.linear(x_BLD.float(), gate.weight.float(), bias)
        scores_BLE = logits_BLE.sigmoid() if self.score_func == "sigmoid" else logits_BLE.softmax(dim=-1)
        choice_BLE = scores_BLE if expert_bias_E is None else scores_BLE + expert_bias_E
        if self.num_expert_groups is not None:
            choice_BLE = self._get_node_limited_routing_scores(choice_BLE)
        _, ids_BLK = torch.topk(choice_BLE, k=self.top_k, dim=-1, sorted=False)
        scores_BLK = scores_BLE.gather(dim=-1, index=ids_BLK)
        if self._debug_force_load_balance:
            ids_BLK, scores_BLK = self._debug_force_load_balance_routing(scores_BLE)
        if self.route_norm:
            scores_BLK = scores_BLK / (scores_BLK.sum(dim=-1, keepdim=True) + 1e-20)
        return scores_BLK * self.route_scale, ids_BLK, scores_BLE


def use_float32_gate(router: TokenChoiceTopKRouter) -> None:
    """Make `router` a `Float32Router` of its own kind, in place; its parameters and settings stay.

    Raises:
        TypeError: Its class has a forward of its own, which this one would drop, or another score function.
    """
    kind = type(router)
    if kind.forward is not TokenChoiceTopKRouter.forward:
        raise TypeError(
            f"router is a {kind.__qualname__} with a forward of its own; only TorchTitan's can be served"
        )
    if router.score_func not in ("sigmoid", "softmax"):
        raise TypeError(f"router has score_func={router.score_func!r}; allowed: 'sigmoid', 'softmax'")
    router.__class__ = type(f"Float32{kind.__name__}", (Float32Router, kind), {})
