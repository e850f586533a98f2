"""vLLM's GPU compiler on our models, run on a CPU: what it captures computes what eager computes, and nothing moves.

What a CUDA graph may hold is checked of the operators, too: no read on the host, no result that is allocated anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

from tests.engine.replays import CASES, DENSE, cases_of, farthest, make_models, pieces_of, replay
from tests.engine.static_replay import RefuseHostReads

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

EXPERTS, DIM, HIDDEN, TOP_K = 8, 64, 32, 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gpu_compiler")
    return replay(cases_of(make_models(folder), CASES), folder)


@pytest.mark.parametrize("name", CASES)
def test_replayed_graphs_compute_what_eager_computes(runs: dict[str, dict[str, Any]], name: str) -> None:
    run = runs[name]
    assert run["inputs"] > 0
    assert run["moved"] == 0
    assert run["pulled_back"] == []
    assert run["pieces"] == pieces_of(name)
    assert run["all_reduces"] == 0
    assert ("JoinedFeedForward" in run["modules"]) == (name in (*DENSE, "deepseek_v3"))  # its shared experts
    worst = farthest(run["replayed"], run["eager"])
    print(f"{name}: {run['pieces']} pieces, {run['inputs']} inputs, log-probabilities within {worst:.1e}")
    assert worst <= 1e-4


def test_operators_that_split_the_graph_allocate_no_result(runs: dict[str, dict[str, Any]]) -> None:
    """What runs between two graphs writes where the graph after it reads."""
    import titan_bridge.engine.model.moe  # noqa: F401  registers the operator

    ours = {op for run in runs.values() for op in run["splitting_ops"] if op.startswith("vllm::titan")}
    assert ours == {"vllm::titan_routed_experts"}
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("vllm::titan")]
    assert ours <= {schema.name for schema in schemas}
    for schema in schemas:
        assert not schema.returns, schema
        assert any(each.alias_info is not None and each.alias_info.is_write for each in schema.arguments)


@contextmanager
def served_experts(
    kind: str, *, hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[Any, RoutedExperts]]:
    """`ServedExperts` known to a forward context under the name "a", and TorchTitan's own with the same weights."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context

    from titan_bridge.engine.model.moe import OwnExpertsDispatcher, ServedExperts, TopKSumDispatcher
    from titan_bridge.models.experts import KeepDtypeGroupedExperts

    torch.manual_seed(0)
    dispatcher = LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K)
    inner = KeepDtypeGroupedExperts.Config(dim=DIM, hidden_dim=hidden, num_experts=EXPERTS)
    routed = RoutedExperts.Config(inner_experts=inner, token_dispatcher=dispatcher).build().to(dtype)
    for parameter in routed.parameters():
        nn.init.normal_(parameter, std=0.1)
    held = RoutedExperts.Config(inner_experts=inner, token_dispatcher=dispatcher).build().to(dtype)
    held.load_state_dict(routed.state_dict())
    if kind == "own":
        first, count = 2, 4
        for name, parameter in list(held.inner_experts.named_parameters()):
            held.inner_experts.register_parameter(name, nn.Parameter(parameter[first : first + count].data))
            parameter_of_all = routed.inner_experts.get_parameter(name).data
            parameter_of_all[:first] = parameter_of_all[first + count :] = 0
        held.token_dispatcher = OwnExpertsDispatcher(held.token_dispatcher, first=first, count=count)
    else:
        held.token_dispatcher.__class__ = TopKSumDispatcher
    config = VllmConfig()
    with set_current_vllm_config(config):
        served = ServedExperts(
            held,
            name="a",
            layer_id=0,
            token_share=None,
            outside_graphs=False,
            compilation=config.compilation_config,
        )
    with torch.inference_mode(), set_forward_context(None, config):
        yield served, routed


def routing(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, DIM, generator=generator).to(dtype)
    scores_TK, ids_TK = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    return x_TD, scores_TK, ids_TK, torch.bincount(ids_TK.flatten(), minlength=EXPERTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("kind", ["all", "own"])
def test_the_operator_has_the_bits_of_torchtitan(kind: str, tokens: int, dtype: torch.dtype) -> None:
    with served_experts(kind, dtype=dtype) as (_, theirs):
        given = routing(tokens, dtype)
        out_TD = torch.full_like(given[0], torch.nan)
        torch.ops.vllm.titan_routed_experts(*given, out_TD, "a")
        wanted = theirs(*(each[None] for each in given[:3]), given[3])[0]
    assert torch.equal(out_TD, wanted)
    assert out_TD.any() == (tokens > 0)


class Largest(TorchDispatchMode):
    """The most bytes of one operator's result while it is entered."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.bytes = max(
            [self.bytes, *(t.nbytes for t in tree_leaves(result) if isinstance(t, torch.Tensor))]
        )
        return result


@pytest.mark.parametrize("kind", ["all", "own"])
def test_a_row_of_each_token_is_added_at_a_time_and_those_of_others_may_hold_anything(kind: str) -> None:
    """vLLM takes what a step needs at most from the KV cache."""
    with served_experts(kind) as (served, _):
        x_TD, *given = routing(300, torch.bfloat16)
        dispatcher = served.token_dispatcher
        rows_ND, _, metadata = dispatcher.dispatch(x_TD, *given)
        if kind == "own":
            n_own = int(metadata.n_own)
            assert 0 < n_own < len(rows_ND)
            rows_ND[n_own:] = 0
        wanted = LocalTokenDispatcher.combine(dispatcher, rows_ND, metadata, x_TD)
        if kind == "own":
            rows_ND[n_own:] = torch.nan
        with Largest() as largest:
            assert torch.equal(dispatcher.combine(rows_ND, metadata, x_TD), wanted)
        assert 0 < largest.bytes <= 4 * x_TD.numel()  # float32, and not a row for each expert of each token


def run_without_data(served: Any, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The operator's body on tensors that have shapes only: whatever reads one on the host raises."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        return served.run(*(mode.from_tensor(each) for each in given))


@pytest.mark.parametrize("kind", ["all", "own"])
def test_experts_in_a_graph_read_nothing_on_the_host(kind: str) -> None:
    """In bfloat16 and of sizes that `captures_experts` allows; `torch._grouped_mm` is one operator there."""
    with served_experts(kind) as (served, _):
        given = routing(40, torch.bfloat16)
        with RefuseHostReads():
            assert served.run(*given).shape == given[0].shape
        assert run_without_data(served, given).shape == given[0].shape


def test_experts_of_odd_sizes_do_read_on_the_host() -> None:
    with served_experts("all", hidden=30) as (served, _), pytest.raises(DataDependentOutputException):
        run_without_data(served, routing(40, torch.bfloat16))


def test_the_operator_keeps_torchs_rules_for_operators() -> None:
    with served_experts("own", dtype=torch.float32):
        given = routing(5, torch.float32)
        out_TD = torch.empty_like(given[0])
        torch.library.opcheck(torch.ops.vllm.titan_routed_experts.default, (*given, out_TD, "a"))
