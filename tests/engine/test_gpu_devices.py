"""A served model's own operators on tensors that say that they are on a GPU: none mixes those with the CPU's.

torch's fake tensors have a device, and an operator that is given two of them raises, as on a real GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
from vllm.config import CompilationConfig

from titan_bridge.engine.model.moe import OwnExpertsDispatcher, ServedExperts, TopKSumDispatcher
from titan_bridge.engine.model.router import use_float32_gate
from titan_bridge.models.experts import KeepDtypeGroupedExperts
from titan_bridge.models.gpt_oss_experts import KeepDtypeGptOssExperts

pytestmark = pytest.mark.engine

EXPERTS, DIM, HIDDEN, TOP_K, TOKENS = 8, 64, 32, 2, 12


class Subscripts(TorchFunctionMode):
    """`x[i]` as an operator: torch without CUDA refuses it on a fake GPU before any operator sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            x, index = args
            if isinstance(index, torch.Tensor):
                return torch.ops.aten.index.Tensor(x, [index])
            dim, part = (-1, index[1]) if isinstance(index, tuple) and index[0] is ... else (0, index)
            if isinstance(part, slice):
                return torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1)
        return func(*args, **(kwargs or {}))


def on_gpu(module: nn.Module) -> nn.Module:
    """With fake parameters and buffers on "cuda", in bfloat16 where they are floating point; in a fake mode."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
                each._parameters[name] = nn.Parameter(fake, requires_grad=False)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return module


def routing() -> tuple[torch.Tensor, ...]:
    x_TD = torch.empty(TOKENS, DIM, dtype=torch.bfloat16, device="cuda")
    scores_TK = torch.empty(TOKENS, TOP_K, device="cuda")
    ids_TK = torch.empty(TOKENS, TOP_K, dtype=torch.int64, device="cuda")
    return x_TD, scores_TK, ids_TK, torch.empty(EXPERTS, dtype=torch.int64, device="cuda")


def served(kind: type, *, own: bool) -> ServedExperts:
    count = 4 if own else EXPERTS
    routed = RoutedExperts.Config(
        inner_experts=KeepDtypeGroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=1),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K),
    ).build()
    routed.inner_experts = kind.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=count).build()
    if own:
        routed.token_dispatcher = OwnExpertsDispatcher(routed.token_dispatcher, first=2, count=count)
    else:
        routed.token_dispatcher.__class__ = TopKSumDispatcher
    options: dict[str, Any] = {"name": "a", "layer_id": 0, "token_share": None, "outside_graphs": False}
    return ServedExperts(routed, compilation=CompilationConfig(), **options)


def test_two_devices_in_one_operator_are_noticed() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="cuda"):
        torch.empty(3, device="cuda") + torch.empty(3)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", [KeepDtypeGroupedExperts, KeepDtypeGptOssExperts])
def test_routed_experts_stay_on_their_device(kind: type, own: bool) -> None:
    experts = served(kind, own=own)
    with FakeTensorMode(), Subscripts(), torch.inference_mode():
        on_gpu(experts)
        out_TD = experts.run(*routing())
    assert (out_TD.device.type, out_TD.dtype, tuple(out_TD.shape)) == ("cuda", torch.bfloat16, (TOKENS, DIM))


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_the_router_stays_on_its_device(score_func: str) -> None:
    gate = Linear.Config(in_features=DIM, out_features=EXPERTS)
    router = TokenChoiceTopKRouter.Config(
        num_experts=EXPERTS, gate=gate, top_k=TOP_K, score_func=score_func
    ).build()
    use_float32_gate(router)
    with FakeTensorMode(), torch.inference_mode():
        on_gpu(router)
        bias_E = torch.empty(EXPERTS, device="cuda")
        found = router(torch.empty(1, TOKENS, DIM, dtype=torch.bfloat16, device="cuda"), bias_E)
    assert {each.device.type for each in found} == {"cuda"}
