"""The served router against TorchTitan's: its float32 gate without autocast has the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from titan_bridge.engine.model.router import use_float32_gate

pytestmark = pytest.mark.engine

DIM, EXPERTS = 64, 16
ROUTERS: dict[str, dict[str, Any]] = {
    "Qwen3": {"score_func": "softmax", "route_norm": True, "top_k": 4},
    "Qwen3, plain scores": {"score_func": "softmax", "top_k": 1},
    "DeepSeek": {
        "score_func": "sigmoid", "route_norm": True, "route_scale": 2.5, "top_k": 3,
        "num_expert_groups": 4, "num_limited_groups": 2,
    },
    "gpt-oss": {"score_func": "softmax", "route_norm": True, "top_k": 4, "bias": True},
    "forced balance": {"score_func": "sigmoid", "top_k": 2, "_debug_force_load_balance": True},
}  # fmt: skip


def router(*, bias: bool = False, **settings: Any) -> TokenChoiceTopKRouter:
    gate = Linear.Config(in_features=DIM, out_features=EXPERTS, bias=bias)
    made = TokenChoiceTopKRouter.Config(num_experts=EXPERTS, gate=gate, **settings).build()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # which torch turns off: the oracle's input is float32
@pytest.mark.parametrize("expert_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROUTERS)
def test_the_gate_in_explicit_float32_has_the_bits_of_autocast(
    name: str, dtype: torch.dtype, expert_bias: bool
) -> None:
    torch.manual_seed(0)
    served = router(**ROUTERS[name]).to(dtype)
    # What autocast does where torch has it for float32, on GPUs: weight, bias and input are cast.
    theirs = copy.deepcopy(served).float()
    use_float32_gate(served)
    assert isinstance(served, TokenChoiceTopKRouter)
    x_BLD = torch.randn(2, 37, DIM).to(dtype)
    bias_E = torch.randn(EXPERTS) if expert_bias else None
    found, wanted = served(x_BLD, bias_E), theirs(x_BLD.float(), bias_E)
    assert [each.dtype for each in found] == [torch.float32, torch.int64, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert served.gate.weight.dtype == dtype


def test_hooks_of_a_subclass_are_kept_and_a_forward_of_its_own_is_refused() -> None:
    class Reversed(TokenChoiceTopKRouter):
        def _get_node_limited_routing_scores(self, scores_for_choice_BLE: torch.Tensor) -> torch.Tensor:
            return -scores_for_choice_BLE

    class Own(TokenChoiceTopKRouter):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    made = router(**ROUTERS["DeepSeek"])
    made.__class__ = Reversed
    use_float32_gate(made)
    _, ids_BLK, scores_BLE = made(torch.randn(1, 5, DIM))
    lowest = scores_BLE.topk(made.top_k, dim=-1, largest=False).indices
    assert torch.equal(ids_BLK.sort(dim=-1).values, lowest.sort(dim=-1).values)
    made = router(**ROUTERS["Qwen3"])
    made.__class__ = Own
    with pytest.raises(TypeError, match="Own with a forward of its own"):
        use_float32_gate(made)
