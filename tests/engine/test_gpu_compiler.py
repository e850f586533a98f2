"""vLLM's GPU compiler on our models, run on a CPU: what it captures computes what eager computes, and nothing moves.

What a CUDA graph may hold is checked of the operators, too: no read on the host, no result that is allocated anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

from tests.conftest import ROOT
from tests.engine.static_replay import RefuseHostReads
from titan_bridge import cpu
from titan_bridge.ports import free_port
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SERVABLE = {"hidden_size": 256, "head_dim": 32}  # vLLM's CPU attention has no kernel for a head_dim of 16
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    # family, config fields, whether a CUDA graph holds the routed experts
    "llama3": ("llama3", SERVABLE, False),
    "qwen3": ("qwen3", {}, False),
    "qwen3_moe": ("qwen3_moe", {}, False),
    "qwen3_moe, experts captured": ("qwen3_moe", {}, True),
    "deepseek_v3": ("deepseek_v3", {"first_k_dense_replace": 0}, False),
    "gpt_oss": ("gpt_oss", {}, False),
}
DENSE = ("llama3", "qwen3")
EXPERTS, DIM, HIDDEN, TOP_K = 8, 64, 32, 3


TWO = {
    "tp": ("llama3", "qwen3", "qwen3_moe", "qwen3_moe, experts captured", "deepseek_v3", "gpt_oss"),
    "dp": ("qwen3_moe",),
}
"""By the axis that two ranks are on, with ep=2 where there are experts: names of `CASES`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu_compiler")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, str]:
    return {
        family: str(make_checkpoint(folder / family, family, tokenizer=False, **fields))  # type: ignore[arg-type]
        for family, fields, _ in CASES.values()
    }


def replay(cases: list[dict[str, Any]], folder: Path, ranks: int = 1) -> dict[str, dict[str, Any]]:
    """What `static_replay.py` found for each case; one process a rank, so that vLLM is imported once."""
    options = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_LOGGING_LEVEL": "ERROR",
        cpu.BIND: "nobind",
    }
    if ranks > 1:
        options |= {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "VLLM_DIST_IDENT": f"titan-{os.getpid()}",
        }
        cases = [case | {"port": free_port()} for case in cases]
    command = [sys.executable, "-m", "tests.engine.static_replay", json.dumps(cases)]
    started = []
    for rank in range(ranks):
        errors = (folder / f"errors-{ranks}-{rank}").open("w+")
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        environment = {**os.environ, **options, **place}
        started.append(
            (
                subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
                ),
                errors,
            )
        )
    try:
        said = started[0][0].communicate()[0]
    finally:
        for process, errors in started:
            process.kill()  # a rank whose other has failed waits for it
            process.wait()
            errors.seek(0)
            print(errors.read()[-4000:])
    return {
        found["name"]: found
        for line in said.splitlines()
        if line.startswith("{")
        for found in [json.loads(line)]
    }


def cases_of(models: dict[str, str], names: Iterable[str], axis: str = "tp") -> list[dict[str, Any]]:
    return [
        {"name": name, "model": models[family], "captures": captures}
        | {"experts": family not in DENSE, "axis": axis}
        for name in names
        for family, _, captures in [CASES[name]]
    ]


@pytest.fixture(scope="module")
def runs(models: dict[str, str], folder: Path) -> dict[str, dict[str, Any]]:
    return replay(cases_of(models, CASES), folder)


@pytest.fixture(scope="module")
def runs_of_two(models: dict[str, str], folder: Path) -> dict[str, dict[str, Any]]:
    cases = [case for axis, names in TWO.items() for case in cases_of(models, names, axis)]
    return replay([case | {"name": f"{case['name']} {case['axis']}"} for case in cases], folder, ranks=2)


def farthest(rows: list[Any], others: list[Any]) -> float:
    """Between the log-probabilities of two runs, which have chosen the same tokens."""
    worst = 0.0
    for (ids, logprobs), (other_ids, other_logprobs) in zip(rows, others, strict=True):
        assert ids == other_ids
        worst = max(worst, *(abs(a - b) for a, b in zip(logprobs, other_logprobs, strict=True)))
    return worst


@pytest.mark.parametrize("name", CASES)
def test_replayed_graphs_compute_what_eager_computes(runs: dict[str, dict[str, Any]], name: str) -> None:
    run = runs[name]
    family, _, captured = CASES[name]
    assert run["inputs"] > 0
    assert run["moved"] == 0
    assert run["pulled_back"] == []
    # Two layers: attention stands between two graphs, and so do experts that are not captured.
    splits = 2 if captured or family in DENSE else 4
    assert run["pieces"] == 2 * splits + 1
    worst = farthest(run["replayed"], run["eager"])
    print(f"{name}: {run['pieces']} pieces, {run['inputs']} inputs, log-probabilities within {worst:.1e}")
    assert worst <= 1e-4


@pytest.mark.parametrize(("axis", "name"), [(axis, name) for axis, names in TWO.items() for name in names])
def test_replayed_graphs_hold_the_collectives_of_two_ranks(
    runs: dict[str, dict[str, Any]], runs_of_two: dict[str, dict[str, Any]], axis: str, name: str
) -> None:
    """With ep=2: only an all-to-all stands between graphs, and what comes out is what one rank computes."""
    run = runs_of_two[f"{name} {axis}"]
    assert run["inputs"] > 0
    assert run["moved"] == 0
    assert run["pulled_back"] == []
    assert run["pieces"] == runs[name]["pieces"]
    assert runs[name]["all_reduces"] == 0
    assert run["all_reduces"] == {"tp": 5, "dp": 0}[axis]  # the embedding's, and two a layer
    worst = max(farthest(run["replayed"], each["eager"]) for each in (run, runs[name]))
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
            held, name="a", layer_id=0, spread=None, splits=False, compilation=config.compilation_config
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
