"""Packed weights compute what the plain ones do, and follow them when they change, or replace them."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torchtitan.models.common.attention import FusedQKVLinear
from torchtitan.models.common.config_utils import make_ffn_config
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear, ScaledBiasRowwiseLinear
from torchtitan.models.common.moe import RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
from vllm.config import CompilationConfig
from vllm.platforms import current_platform

from titan_bridge.engine.cpu import packed
from titan_bridge.engine.cpu.packed import (
    PackedFeedForward,
    PackedLinear,
    PackedQKV,
    PackedScaledBiasLinear,
    _joined,
    use_packed_weights,
)
from titan_bridge.engine.cpu.packed_experts import PackedExperts, combine, pack_experts
from titan_bridge.engine.cpu.packing import Packing
from titan_bridge.engine.model.moe import OwnExpertsDispatcher, ServedExperts
from titan_bridge.memory import bytes_of
from titan_bridge.models.experts import KeepDtypeGroupedExperts

pytestmark = pytest.mark.engine

DIM, HIDDEN, EXPERTS = 64, 96, 5
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
COUNTS = (7, 0, 1, 30, 2)


@pytest.fixture
def model() -> nn.ModuleDict:
    """One linear, one attention's projection, one feed-forward and one MoE layer's experts in bfloat16."""
    current_platform.import_kernels()
    torch.manual_seed(0)
    experts = KeepDtypeGroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS).build()
    linear = Linear.Config(in_features=DIM, out_features=HIDDEN, bias=False).build()
    feed_forward = make_ffn_config(dim=DIM, hidden_dim=HIDDEN, w1_param_init={}, w2w3_param_init={}).build()
    rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    qkv = FusedQKVLinear.Config(
        head_dim=HEAD_DIM,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        wqkv=Linear.Config(in_features=DIM, out_features=rows, bias=False),
    ).build()
    model = nn.ModuleDict({"linear": linear, "qkv": qkv, "feed_forward": feed_forward, "experts": experts})
    model.to(torch.bfloat16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def _live(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters(remove_duplicate=False)}


def _packed(model: nn.Module, *, keep: bool) -> Packing:
    """`model` with the weights that it has, packed."""
    use_packed_weights(model, torch.bfloat16)
    packing = Packing(model, _live(model), keep=keep)
    with packing.loading():
        pass
    return packing


def _dropped(model: nn.Module) -> tuple[Packing, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """`model` packed, its plain weights gone; those, and what they were."""
    use_packed_weights(model, torch.bfloat16)
    live = _live(model)
    old = {name: weight.clone() for name, weight in live.items()}
    packing = Packing(model, live, keep=False)
    with packing.loading():
        pass
    return packing, live, old


def _outputs(model: nn.ModuleDict, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        return (
            model["linear"](x),
            *model["qkv"](x[None]),
            model["feed_forward"](x[None]),
            model["experts"](x, torch.tensor(COUNTS)),
        )


def _error(model: nn.ModuleDict, referee: nn.ModuleDict) -> float:
    """The largest relative difference to float32 of any output."""
    x = torch.randn(sum(COUNTS), DIM, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    pairs = zip(_outputs(model, x), _outputs(referee, x.float()), strict=True)
    return max(((ours - wanted).abs().max() / wanted.abs().max()).item() for ours, wanted in pairs)


def test_packed_weights_compute_what_plain_ones_do_and_follow_them(model: nn.ModuleDict) -> None:
    referee = copy.deepcopy(model).float()
    plain = _error(model, referee)
    names = [name for name, _ in model.named_parameters()]
    packing = _packed(model, keep=True)
    assert type(model["linear"]) is PackedLinear
    assert type(model["qkv"]) is PackedQKV
    assert type(model["qkv"].get_submodule("wqkv")) is Linear
    assert type(model["feed_forward"]) is PackedFeedForward
    assert [type(model["feed_forward"].get_submodule(w)) for w in ("w1", "w2", "w3")] == [
        Linear,
        PackedLinear,
        Linear,
    ]
    assert type(model["experts"]) is PackedExperts
    assert [name for name, _ in model.named_parameters()] == names
    assert _error(model, referee) <= 2 * plain

    # Each with another one, whose copy is not made from it.
    for name, other in {
        "linear.weight": "experts.w2_EDF",
        "qkv.wqkv.weight": "linear.weight",
        "feed_forward.w1.weight": "feed_forward.w2.weight",
        "feed_forward.w2.weight": "feed_forward.w3.weight",
        "experts.w3_EFD": "linear.weight",
    }.items():
        with torch.no_grad():
            for one in (model, referee):
                one.get_parameter(name).mul_(-2)
        assert _error(model, referee) > 0.5  # nobody has said that it changed
        packing.refresh([model.get_parameter(other)])
        assert _error(model, referee) > 0.5
        packing.refresh([model.get_parameter(name)])
        assert _error(model, referee) <= 2 * plain


def _is_hollow(weight: torch.Tensor) -> bool:
    return weight.untyped_storage().nbytes() == weight.itemsize


def test_plain_weights_are_gone_as_soon_as_their_module_is_packed(model: nn.ModuleDict) -> None:
    wanted = {name: weight.clone() for name, weight in _live(model).items()}
    plain = copy.deepcopy(model)
    use_packed_weights(model, torch.bfloat16)
    live = _live(model)
    packing = Packing(model, live, keep=False)
    gone: list[str] = []
    with packing.loading() as loading:
        for name in wanted:
            loading.arrived(name)
            gone += [other for other in wanted if _is_hollow(live[other]) and other not in gone]
            assert name in gone or name.endswith(("w1.weight", "w1_EFD", "w2_EDF"))  # packed with a later one
    assert sorted(gone) == sorted(wanted)
    assert all(_is_hollow(weight) for weight in model.parameters())
    assert {name: weight.shape for name, weight in model.named_parameters()} == {
        name: weight.shape for name, weight in wanted.items()
    }
    assert model.get_parameter("linear.weight").isnan().all()
    with pytest.raises(RuntimeError, match="single memory location"):
        live["linear.weight"].copy_(wanted["linear.weight"])
    referee = plain.float()
    assert _error(model, referee) < 0.02

    with packing.unpacked():
        for name, weight in model.named_parameters():
            assert torch.equal(weight, wanted[name]), name
            assert torch.equal(live[name], wanted[name]), name
    assert all(_is_hollow(weight) for weight in live.values())


def test_new_weights_go_where_the_old_ones_were_dropped(model: nn.ModuleDict) -> None:
    referee = copy.deepcopy(model).float()
    packing, live, old = _dropped(model)
    with packing.loading() as loading:
        for name, weight in live.items():
            weight.copy_(-2 * old[name])
            loading.arrived(name)
    with torch.no_grad():
        for weight in referee.parameters():
            weight.mul_(-2)
    assert _error(model, referee) < 0.02
    assert all(_is_hollow(weight) for weight in live.values())


def test_piecemeal_the_next_module_takes_the_place_of_the_last(model: nn.ModuleDict) -> None:
    referee = copy.deepcopy(model).float()
    packing, live, old = _dropped(model)
    places, half = [], DIM // 2
    with packing.loading(piecemeal=True) as loading:
        assert all(_is_hollow(weight) for weight in live.values())
        for name in sorted(live, key=lambda name: -live[name].nbytes):  # so that each fits where one was
            if name == "qkv.wqkv.weight":  # nothing of it is in the file, as of a rank that has only padding
                continue
            cut = name == "linear.weight"  # the rest of it is padding
            loading.begin(name, whole=not cut)
            weight = live[name][: half if cut else None]
            weight.copy_(-2 * old[name][: half if cut else None])
            places.append(weight.untyped_storage().data_ptr())
            loading.arrived(name)
    # The experts', where all others fit in later, and one for w2 of the feed-forward, which is read between w1 and w3.
    assert len(set(places)) == 2
    with torch.no_grad():
        for weight in referee.parameters():
            weight.mul_(-2)
        referee.get_parameter("linear.weight")[half:] = 0
        referee.get_parameter("qkv.wqkv.weight").zero_()
    x_TD = torch.randn(3, DIM).to(torch.bfloat16)
    assert not model["linear"](x_TD)[:, half:].any()
    assert not any(part.any() for part in model["qkv"](x_TD[None]))
    for name in ("linear", "feed_forward"):
        wanted = referee[name](x_TD.float()[None])
        assert (model[name](x_TD[None]) - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert all(_is_hollow(weight) for weight in live.values())


def test_weights_that_lie_together_are_joined_without_a_copy() -> None:
    both_FD = torch.randn(8, 3)
    first_FD, second_FD = both_FD[2:4], both_FD[4:7]
    joined_FD = _joined(first_FD, second_FD)
    assert joined_FD.data_ptr() == first_FD.data_ptr()
    assert torch.equal(joined_FD, both_FD[2:7])
    assert torch.equal(_joined(second_FD, first_FD), torch.cat([second_FD, first_FD]))
    memory = bytearray(bytes_of(both_FD[2:7]))  # neighbours in memory, and of different storages
    halves = (torch.frombuffer(memory, dtype=torch.float32, count=6, offset=at).view(2, 3) for at in (0, 24))
    assert torch.equal(_joined(*halves), both_FD[2:6])


def test_after_an_error_modules_that_were_not_packed_go_on_with_what_they_had(model: nn.ModuleDict) -> None:
    referee = copy.deepcopy(model).float()
    packing = _packed(model, keep=False)
    with pytest.raises(OSError, match="gone"), packing.loading():
        raise OSError("the file is gone")
    assert all(_is_hollow(weight) for weight in model.parameters())
    assert _error(model, referee) < 0.02


@pytest.mark.parametrize("tp", [None, 2])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_bias_is_added_as_it_is_now(tokens: int, tp: int | None) -> None:
    """`tp`: of the linear that adds its share of the bias on each rank."""
    current_platform.import_kernels()
    torch.manual_seed(0)
    kind, wanted = (Linear, PackedLinear) if tp is None else (ScaledBiasRowwiseLinear, PackedScaledBiasLinear)
    model = nn.ModuleDict({"linear": kind.Config(in_features=DIM, out_features=HIDDEN, bias=True).build()})
    model.to(torch.bfloat16)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    if tp is not None:
        model["linear"].tp_degree = tp
    referee = copy.deepcopy(model)
    _packed(model, keep=False)
    assert type(model["linear"]) is wanted
    for one in (model, referee):  # biases are not packed: what is written there counts at once
        one["linear"].bias.data.mul_(-3)
    x_TD = torch.randn(tokens, DIM).to(torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(model["linear"](x_TD), referee["linear"](x_TD), rtol=2**-7, atol=2**-6)


def test_a_tied_weight_stays(model: nn.ModuleDict) -> None:
    model["embedding"] = nn.Embedding(HIDDEN, DIM, dtype=torch.bfloat16)
    model["linear"].weight = model["embedding"].weight
    x_TD = torch.randn(3, DIM).to(torch.bfloat16)
    _packed(model, keep=False)
    assert torch.allclose(model["linear"](x_TD), x_TD @ model["embedding"].weight.t(), rtol=0.02, atol=0.1)
    assert _is_hollow(model.get_parameter("qkv.wqkv.weight"))


def test_float32_is_left_alone(model: nn.ModuleDict) -> None:
    use_packed_weights(model.float(), torch.float32)
    assert type(model["linear"]) is Linear
    assert type(model["qkv"]) is FusedQKVLinear
    assert type(model["feed_forward"]) is FeedForward
    assert type(model["experts"]) is KeepDtypeGroupedExperts


def test_what_packing_costs_is_said_in_vllms_log(
    model: nn.ModuleDict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed, "product_dtype", lambda: torch.float32)
    vllms = logging.getLogger("vllm")
    caplog.set_level(logging.INFO, logger="vllm")
    vllms.addHandler(caplog.handler)  # vLLM's loggers do not propagate
    try:
        use_packed_weights(model, torch.bfloat16)
    finally:
        vllms.removeHandler(caplog.handler)
    assert "weights are held in float32" in caplog.text


def test_a_routers_gate_is_left_alone() -> None:
    current_platform.import_kernels()
    gate = Linear.Config(in_features=DIM, out_features=EXPERTS)
    model = nn.ModuleDict({"router": TokenChoiceTopKRouter.Config(num_experts=EXPERTS, gate=gate).build()})
    model["linear"] = gate.build()
    use_packed_weights(model, torch.bfloat16)
    assert type(model["router"].gate) is Linear
    assert type(model["linear"]) is PackedLinear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_rows_are_combined_with_the_bits_of_torchtitan(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dispatcher = LocalTokenDispatcher(LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=3))
    x_TD = torch.randn(tokens, DIM).to(dtype)
    scores_TK, ids_TK = torch.rand(tokens, EXPERTS).topk(3)
    rows_RD, _, metadata = dispatcher.dispatch(x_TD, scores_TK, ids_TK, torch.zeros(EXPERTS))
    rows_RD = torch.randn_like(rows_RD)
    wanted = dispatcher.combine(rows_RD, metadata, x_TD)
    given = (metadata.topk_scores_experts_sorted_N, metadata.token_indices_experts_sorted_N, x_TD)
    assert torch.equal(combine(rows_RD, *given), wanted)
    assert not tokens or not torch.equal(wanted, torch.zeros_like(wanted))


@pytest.mark.parametrize("tokens", [0, 1, 9, 600])
@pytest.mark.parametrize("first", [None, 0, 2])
def test_rows_of_own_experts_alone_give_the_bits_of_torchtitan(tokens: int, first: int | None) -> None:
    current_platform.import_kernels()
    torch.manual_seed(0)
    dispatcher = LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=2)
    count = EXPERTS if first is None else 2
    experts = KeepDtypeGroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=count)
    routed = RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher).build()
    for parameter in routed.to(torch.bfloat16).parameters():
        nn.init.normal_(parameter, std=0.1)
    pack_experts(routed.inner_experts, layouts=(None, True))  # a product for each expert, on any processor
    _packed(routed, keep=False)
    if first is not None:
        routed.token_dispatcher = OwnExpertsDispatcher(routed.token_dispatcher, first=first, count=count)
    served = ServedExperts(
        routed, name="a", layer_id=0, token_share=None, outside_graphs=False, compilation=CompilationConfig()
    )
    x_TD = torch.randn(tokens, DIM).to(torch.bfloat16)
    scores_TK, ids_TK = torch.rand(tokens, EXPERTS).topk(2)
    count_E = torch.bincount(ids_TK.flatten(), minlength=EXPERTS)
    with torch.inference_mode():
        # TorchTitan's forward on the same packed products, with every routed row.
        wanted = routed(x_TD[None], scores_TK[None], ids_TK[None], count_E)[0]
        found = served.run(x_TD, scores_TK, ids_TK, count_E)
    assert torch.equal(found, wanted)
    own = slice(None) if first is None else slice(first, first + count)
    assert found.any() == (count_E[own].sum() > 0)  # a token may have none of its experts here
