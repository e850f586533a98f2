"""A spec is a value, and a parameter keeps it."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from vllm.model_executor.utils import replace_parameter

from titan_bridge.errors import BridgeError
from titan_bridge.sharding import Box, ShardingSpec, attach, get, placement_from_str
from titan_bridge.sharding.spec import attach_module, attached, placement_to_str

PLACEMENTS = (Replicate(), _StridedShard(0, split_factor=2), Shard(0))
SPEC = ShardingSpec(mesh="dense", placements=PLACEMENTS)


class Model(nn.Module):
    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, device=device)
        self.norm = nn.LayerNorm(4, device=device)
        self.register_buffer("bias", torch.zeros(4, device=device))


def model_with_specs(device: str = "cpu") -> Model:
    model = Model(device)
    attach_module(model.linear, "weight", "dense", PLACEMENTS)
    attach_module(model, "bias", "sparse", (Shard(0),))
    return model


def test_a_spec_is_a_value():
    same = ShardingSpec(mesh="dense", placements=list(PLACEMENTS))
    assert same == SPEC
    assert hash(same) == hash(SPEC)
    assert pickle.loads(pickle.dumps(SPEC)) == SPEC
    assert str(SPEC) == "dense(R, SS(0,2), S(0))"
    assert ShardingSpec(mesh="d", placements=(Shard(0),)) != ShardingSpec(
        mesh="d", placements=(_StridedShard(0, split_factor=1),)
    )


def test_box_of_a_spec():
    assert [piece.box for piece in SPEC.pieces((8, 3), (1, 2, 2), (0, 1, 0))] == [
        Box(start=(2, 0), stop=(4, 3))
    ]
    assert SPEC.local_shape((8, 3), (1, 2, 2), (0, 1, 0)) == (2, 3)


@pytest.mark.parametrize("text", ["R", "S(0)", "S(11)", "SS(0,2)", "SS(3,16)"])
def test_placements_as_text(text):
    assert placement_to_str(placement_from_str(text)) == text


@pytest.mark.parametrize("text", ["", "P", "S", "S(-1)", "S(0) ", "SS(0)", "SS(0,0)", "s(0)", None, 3])
def test_other_text_is_refused(text):
    with pytest.raises(BridgeError):
        placement_from_str(text)


@pytest.mark.parametrize("placement", [Partial(), Shard(-1), "S(0)"])
def test_what_no_parameter_can_be(placement):
    with pytest.raises(BridgeError):
        ShardingSpec(mesh="dense", placements=(placement,))


def test_none_means_replicated():
    param = nn.Parameter(torch.zeros(2))
    assert get(param) is None
    attach(param, "dense", (Replicate(), Replicate()))
    assert get(param) is None
    assert attached(param) == ShardingSpec(mesh="dense", placements=(Replicate(), Replicate()))


def test_the_attribute_survives_conversion_in_place_and_reload():
    model = model_with_specs().to(torch.bfloat16)
    assert get(model.linear.weight) == SPEC
    model.load_state_dict(Model().state_dict())
    model.linear.weight.data = torch.ones(2, 2)
    assert get(model.linear.weight) == SPEC
    assert get(pickle.loads(pickle.dumps(model)).linear.weight) == SPEC


def lose_by_to_empty(model):
    return model.to_empty(device="cpu")


def lose_by_replacement(model):
    model.linear.weight = nn.Parameter(torch.ones(4, 4))
    model.bias = torch.ones(4)


def lose_by_vllm(model):
    replace_parameter(model.linear, "weight", torch.ones(4, 4))
    model.bias = torch.ones(4)


def lose_by_assignment(model):
    model.load_state_dict({name: t.clone() for name, t in Model().state_dict().items()}, assign=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("lose", [lose_by_to_empty, lose_by_replacement, lose_by_vllm, lose_by_assignment])
def test_the_module_remembers_what_the_tensor_lost(lose, device):
    model = model_with_specs(device)
    lose(model)
    assert get(model.bias) is None
    assert get(model.linear, "weight") == SPEC
    assert get(model, "bias") == ShardingSpec(mesh="sparse", placements=(Shard(0),))
    assert get(model.norm, "weight") is None


def test_no_such_parameter():
    with pytest.raises(BridgeError, match=r"no parameter or buffer 'w'.*'weight'"):
        attach_module(Model().linear, "w", "dense", (Shard(0),))
