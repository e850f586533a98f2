"""Packed weights compute what the plain ones do, and follow them when they change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchtitan.models.common.linear import Linear
from vllm.platforms import current_platform

from titan_bridge.engine.cpu_packed import PackedExperts, PackedLinear, refresh, use_packed_weights
from titan_bridge.models.experts import KeepDtypeGroupedExperts

pytestmark = pytest.mark.engine

DIM, HIDDEN, EXPERTS = 64, 96, 5
COUNTS = (7, 0, 1, 30, 2)


@pytest.fixture
def model() -> nn.ModuleDict:
    """One linear and one MoE layer's experts in bfloat16."""
    current_platform.import_kernels()
    torch.manual_seed(0)
    experts = KeepDtypeGroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS).build()
    linear = Linear.Config(in_features=DIM, out_features=HIDDEN, bias=False).build()
    model = nn.ModuleDict({"linear": linear, "experts": experts}).to(torch.bfloat16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def _outputs(model: nn.ModuleDict, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        return model["linear"](x), model["experts"](x, torch.tensor(COUNTS))


def _error(model: nn.ModuleDict, referee: nn.ModuleDict) -> float:
    """The largest relative difference to float32 of either output."""
    x = torch.randn(sum(COUNTS), DIM, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    pairs = zip(_outputs(model, x), _outputs(referee, x.float()), strict=True)
    return max(((ours - wanted).abs().max() / wanted.abs().max()).item() for ours, wanted in pairs)


def test_packed_weights_compute_what_plain_ones_do_and_follow_them(model: nn.ModuleDict) -> None:
    referee = copy.deepcopy(model).float()
    plain = _error(model, referee)
    names = [name for name, _ in model.named_parameters()]
    use_packed_weights(model, torch.bfloat16)
    refresh(model)
    assert type(model["linear"]) is PackedLinear
    assert type(model["experts"]) is PackedExperts
    assert [name for name, _ in model.named_parameters()] == names
    assert _error(model, referee) <= 2 * plain

    changed = [model["linear"].weight, model["experts"].w3_EFD]
    with torch.no_grad():
        for module in (model, referee):
            module["linear"].weight.mul_(-2)
            module["experts"].w3_EFD.mul_(-2)
    assert _error(model, referee) > 0.5  # nobody has said that they changed
    refresh(model, changed[:1])
    assert _error(model, referee) > 0.5
    refresh(model, changed)
    assert _error(model, referee) <= 2 * plain


def test_float32_is_left_alone(model: nn.ModuleDict) -> None:
    use_packed_weights(model.float(), torch.float32)
    assert type(model["linear"]) is Linear
    assert type(model["experts"]) is KeepDtypeGroupedExperts
