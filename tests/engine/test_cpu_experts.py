"""Packed routed experts in each layout compute what TorchTitan's do, and give their weights back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
from vllm import _custom_ops as ops
from vllm.config import CompilationConfig
from vllm.platforms import current_platform

from titan_bridge.engine.cpu.onednn import product_dtype
from titan_bridge.engine.cpu.packed_experts import (
    FEW_FOREIGN,
    FEW_ROWS,
    PackedExperts,
    PackedGptOssExperts,
    isa_for,
    layouts_for,
    pack_experts,
)
from titan_bridge.engine.cpu.packing import Packing
from titan_bridge.engine.model.moe import OwnExpertsDispatcher, ServedExperts
from titan_bridge.models.experts import KeepDtypeGroupedExperts
from titan_bridge.models.gpt_oss_experts import KeepDtypeGptOssExperts

pytestmark = pytest.mark.engine

DIM, HIDDEN, EXPERTS, TOP_K = 64, 96, 5, 2
LAYOUTS = {
    "amx": ("amx", False),
    "vec": ("vec", False),
    "vec and products": ("vec", True),
    "products": (None, True),
}
KINDS = {KeepDtypeGroupedExperts: PackedExperts, KeepDtypeGptOssExperts: PackedGptOssExperts}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    current_platform.import_kernels()
    if request.param == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX")
    return request.param


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def experts(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = request.param.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS).build().to(torch.bfloat16)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


def packed(experts: nn.Module, layout: str, *, keep: bool = False) -> Packing:
    """`experts` in `layout`, in place."""
    kind = KINDS[type(experts)]
    assert pack_experts(experts, layouts=LAYOUTS[layout])
    assert type(experts) is kind
    live = {name: weight.detach() for name, weight in experts.named_parameters()}
    packing = Packing(experts, live, keep=keep)
    with packing.loading():
        pass
    return packing


def total(first: int | None) -> int:
    """Experts of all ranks, where this one's begin at `first` and another rank has one behind them."""
    return EXPERTS if first is None else first + EXPERTS + 1


def served(experts: nn.Module, first: int | None, **more: bool) -> ServedExperts:
    """What the engine makes of them on a rank."""
    dispatcher = LocalTokenDispatcher.Config(num_experts=total(first), top_k=TOP_K)
    routed = RoutedExperts.Config(
        inner_experts=KeepDtypeGroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=1),
        token_dispatcher=dispatcher,
    ).build()
    routed.inner_experts = experts
    if first is not None:
        routed.token_dispatcher = OwnExpertsDispatcher(routed.token_dispatcher, first=first, count=EXPERTS)
    options = {"name": "a", "layer_id": 0, "token_share": None, "outside_graphs": False, **more}
    return ServedExperts(routed, compilation=CompilationConfig(), **options)


def error(experts: nn.Module, referee: nn.Module, tokens: int, first: int | None) -> float:
    """The largest difference to `referee` in float32, relative to its largest number."""
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, DIM, generator=generator).to(torch.bfloat16)
    scores_TK, ids_TK = torch.rand(tokens, total(first), generator=generator).topk(TOP_K)
    count_E = torch.bincount(ids_TK.flatten(), minlength=total(first))
    with torch.inference_mode():
        found_TD = served(experts, first).run(x_TD, scores_TK, ids_TK, count_E)
        wanted_TD = torch.zeros(tokens, DIM)
        for expert in range(EXPERTS):
            rows, columns = (ids_TK == expert + (first or 0)).nonzero(as_tuple=True)
            counts_E = torch.zeros(EXPERTS, dtype=torch.int64)
            counts_E[expert] = len(rows)
            out = referee(x_TD[rows].float(), counts_E) * scores_TK[rows, columns, None]
            wanted_TD.index_add_(0, rows, out)
    assert found_TD.dtype == torch.bfloat16
    if not tokens:
        assert found_TD.shape == (0, DIM)
        return 0.0
    return ((found_TD - wanted_TD).abs().max() / wanted_TD.abs().max()).item()


@pytest.mark.parametrize("first", [None, 0, 2])
def test_any_layout_is_as_near_to_float32_as_the_plain_weights(
    experts: nn.Module, layout: str, first: int | None
) -> None:
    referee = copy.deepcopy(experts).float()
    sizes = (0, 1, 9, 600)  # below and above FEW_ROWS rows an expert
    assert 9 * TOP_K / EXPERTS < FEW_ROWS < 600 * TOP_K / EXPERTS
    assert 9 * TOP_K in FEW_FOREIGN
    assert 600 * TOP_K not in FEW_FOREIGN
    plain = [error(experts, referee, tokens, first) for tokens in sizes]
    packed(experts, layout)
    found = [error(experts, referee, tokens, first) for tokens in sizes]
    print(layout, first, plain, found)
    assert all(0 < error <= 2 * before for error, before in zip(found[1:], plain[1:], strict=True))


@pytest.mark.parametrize("tokens", [FEW_FOREIGN.start // TOP_K, FEW_FOREIGN.stop])
def test_a_rank_without_a_token_of_its_own_adds_nothing(experts: nn.Module, layout: str, tokens: int) -> None:
    packed(experts, layout)
    ids_TK = torch.tensor([[0, 1]] * tokens)
    count_E = torch.bincount(ids_TK.flatten(), minlength=total(2))
    x_TD, scores_TK = torch.randn(tokens, DIM).to(torch.bfloat16), torch.rand(tokens, TOP_K)
    with torch.inference_mode():
        assert not served(experts, 2).run(x_TD, scores_TK, ids_TK, count_E).any()
        assert served(experts, 0).run(x_TD, scores_TK, ids_TK, count_E).any()


@pytest.mark.parametrize("first", [None, 2])
def test_a_step_calls_experts_itself_and_a_compiled_one_where_they_are_one_operator(
    experts: nn.Module, layout: str, first: int | None
) -> None:
    """Else they are behind an opaque operator, which finds its module by the forward context; here is none."""
    packed(experts, layout)
    assert not served(experts, None, reports=True)._is_one_operator()
    watched = served(experts, first)
    assert watched._is_one_operator() == (not LAYOUTS[layout][1] and first is None)
    x_BLD = torch.randn(1, 9, DIM).to(torch.bfloat16)
    scores_BLK, ids_BLK = torch.rand(1, 9, total(first)).topk(TOP_K)
    given = x_BLD, scores_BLK, ids_BLK, torch.bincount(ids_BLK.flatten(), minlength=total(first))
    torch._dynamo.reset()  # it counts what was compiled of one method
    compiled = torch.compile(watched, backend="eager", fullgraph=True)
    with torch.inference_mode():
        wanted_TD = watched.run(x_BLD[0], scores_BLK[0], ids_BLK[0], given[-1])
        assert torch.equal(watched(*given)[0], wanted_TD)
        if watched._is_one_operator():
            assert torch.equal(compiled(*given)[0], wanted_TD)
        else:
            with pytest.raises(AssertionError, match="Forward context"):
                compiled(*given)
    watched.capture_fn = lambda ids_TK: None
    assert not watched._is_one_operator()


def test_ranks_that_add_up_share_the_second_bias(layout: str) -> None:
    torch.manual_seed(0)
    experts = KeepDtypeGptOssExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS).build()
    for parameter in experts.to(torch.bfloat16).parameters():
        nn.init.normal_(parameter, std=0.1)
    experts.tp_degree = 2
    referee = copy.deepcopy(experts).float()
    packed(experts, layout)
    assert error(experts, referee, 9, None) < 0.02
    experts.tp_degree = 1
    assert error(experts, referee, 9, None) > 0.02


def test_sorted_rows_come_back_in_their_order(experts: nn.Module, layout: str) -> None:
    referee = copy.deepcopy(experts).float()
    packed(experts, layout)
    counts_E = torch.tensor([3, 0, 1, 6, 2])
    x_RD = torch.randn(14, DIM).to(torch.bfloat16)  # two rows of no expert
    with torch.inference_mode():
        found, wanted = experts(x_RD, counts_E)[:12], referee(x_RD.float(), counts_E)[:12]
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_weights_come_back_bit_for_bit_and_new_ones_take_their_place(experts: nn.Module, layout: str) -> None:
    with torch.no_grad():
        first = next(experts.parameters())
        if LAYOUTS[layout][0]:
            first.view(-1)[:3] = torch.tensor([-0.0, torch.inf, -torch.inf])
    given = {name: weight.detach().clone() for name, weight in experts.named_parameters()}
    packing = packed(experts, layout)
    with packing.unpacked():
        for name, weight in experts.named_parameters():
            assert torch.equal(weight.view(torch.int16), given[name].view(torch.int16)), name

    for weight in given.values():
        weight.nan_to_num_(0, 0, 0).mul_(-3)
    with packing.loading():
        for name, weight in experts.named_parameters():
            weight.data.copy_(given[name])
    referee = type(experts).__mro__[2].Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS).build()
    referee.load_state_dict({name: weight.float() for name, weight in given.items()})
    assert error(experts, referee, 9, None) < 0.02


def test_in_float32_the_operator_is_the_loop() -> None:
    """float32 is served unpacked, by the loop; here both compute the same numbers."""
    current_platform.import_kernels()
    torch.manual_seed(0)
    loop = KeepDtypeGroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS).build()
    for parameter in loop.parameters():
        nn.init.normal_(parameter, std=0.1)
    counts_E = torch.tensor([3, 0, 1, 6, 2])
    x_RD = torch.randn(12, DIM)
    with torch.inference_mode():
        wanted_RD = loop(x_RD, counts_E)
        up = ops.cpu_prepack_moe_weight(torch.cat([loop.w1_EFD, loop.w3_EFD], 1), "vec")
        down = ops.cpu_prepack_moe_weight(loop.w2_EDF.data, "vec")
        ids = torch.arange(EXPERTS, dtype=torch.int32).repeat_interleave(counts_E)[:, None]
        out_RD = torch.empty_like(x_RD)
        ops.cpu_fused_moe(out_RD, x_RD, up, down, None, None, torch.ones(12, 1), ids, "silu", "vec")
    assert (out_RD - wanted_RD).abs().max() <= 1e-6 * wanted_RD.abs().max()


def test_sizes_that_no_layout_takes_stay_products() -> None:
    current_platform.import_kernels()
    assert isa_for((64, 96)) is not None
    assert isa_for((64, 90)) is None
    assert layouts_for((64, 90), once=False) == layouts_for((64, 90), once=True) == (None, True)


def test_one_layout_is_held_where_it_wins_at_every_size() -> None:
    current_platform.import_kernels()
    isa, products = layouts_for((64, 96), once=False)
    assert products == (isa != "amx" and product_dtype() == torch.bfloat16)
    assert layouts_for((64, 96), once=True) == ((None, True) if products else (isa, False))
