"""vLLM's GPU compiler on two ranks, run on a CPU: graphs hold the collectives, and compute what TorchTitan computes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.replays import CASES, cases_of, farthest, make_models, pieces_of, replay
from tests.engine.static_replay import PROMPTS
from titan_bridge.reference import load_reference

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TWO = {
    "tp": ("llama3", "qwen3", "qwen3_moe", "qwen3_moe, experts captured", "deepseek_v3", "gpt_oss"),
    "dp": ("qwen3_moe",),
}
"""By the axis that two ranks are on, with ep=2 where there are experts: names of `CASES`."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def runs(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    cases = [case for axis, names in TWO.items() for case in cases_of(models, names, axis)]
    named = [case | {"name": f"{case['name']} {case['axis']}"} for case in cases]
    return replay(named, tmp_path_factory.mktemp("runs"), ranks=2)


def reference(model: str, rows: list[Any]) -> list[Any]:
    """Tokens and log-probabilities that TorchTitan's own forward would have chosen where `rows` were generated."""
    forward, chosen = load_reference(model), []
    for prompt, (ids, _) in zip(PROMPTS, rows, strict=True):
        best = forward.logprobs([*prompt, *ids])[len(prompt) - 1 : -1].max(dim=-1)
        chosen.append([best.indices.tolist(), best.values.tolist()])
    return chosen


@pytest.mark.parametrize(("axis", "name"), [(axis, name) for axis, names in TWO.items() for name in names])
def test_replayed_graphs_hold_the_collectives_of_two_ranks(
    models: dict[str, str], runs: dict[str, dict[str, Any]], axis: str, name: str
) -> None:
    """With ep=2: only an all-to-all stands between graphs."""
    run = runs[f"{name} {axis}"]
    assert run["inputs"] > 0
    assert run["moved"] == 0
    assert run["pulled_back"] == []
    assert run["pieces"] == pieces_of(name)
    assert run["all_reduces"] == {"tp": 5, "dp": 0}[axis]  # the embedding's, and two a layer
    rows = run["replayed"]
    worst = max(farthest(rows, others) for others in (run["eager"], reference(models[CASES[name][0]], rows)))
    print(f"{name}: {run['pieces']} pieces, {run['inputs']} inputs, log-probabilities within {worst:.1e}")
    assert worst <= 1e-4
