"""Both matrices up of a dense MLP in one product: TorchTitan's numbers, and parameters that are written as before."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear

from titan_bridge.engine.model.feed_forward import JoinedFeedForward, join_up

pytestmark = pytest.mark.engine

DIM, HIDDEN = 48, 80


def feed_forward(*, bias: bool = False) -> FeedForward:
    up = Linear.Config(in_features=DIM, out_features=HIDDEN, bias=bias)
    down = Linear.Config(in_features=HIDDEN, out_features=DIM)
    return FeedForward.Config(w1=up, w2=down, w3=up).build()


def on_meta(*modules: nn.Module) -> nn.Module:
    model = nn.ModuleList(modules).to("meta")
    join_up(model, torch.device("cpu"))
    return model


def test_joined_memory_computes_what_torchtitan_computes() -> None:
    theirs = feed_forward()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    (ours,) = on_meta(feed_forward())
    assert type(ours) is JoinedFeedForward
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.w2.weight = nn.Parameter(theirs.w2.weight.data)
    x_TD = torch.randn(7, DIM)
    with torch.inference_mode():
        for scale in (1.0, -0.5):  # weights are written in place, again and again
            for name in ("w1", "w3"):
                weight = ours.get_submodule(name).weight
                assert weight.is_contiguous()
                weight.copy_(scale * theirs.get_submodule(name).weight)
            x_TD = x_TD / scale
            gate, up = (scale * theirs.get_submodule(name)(x_TD) for name in ("w1", "w3"))
            torch.testing.assert_close(ours(x_TD), theirs.w2(nn.functional.silu(gate) * up))


def test_biases_and_collectives_keep_torchtitans_way() -> None:
    (biased,) = on_meta(feed_forward(bias=True))
    assert type(biased) is FeedForward
    gathered = feed_forward()
    gathered.w3.forward = lambda x: x
    with pytest.raises(AssertionError):
        on_meta(gathered)
