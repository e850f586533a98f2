"""The table of `features.py`, run: our class, plain and with attention groups, against vLLM's own model on the same
weights, in one server each.

What is refused is in `test_bad_input.py`, where the process is that needs no engine.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModel

from tests.engine.features import LONG, SAME, Same
from titan_bridge import cli
from titan_bridge.config.schema import InferConfig
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]  # three servers, one after the other

ATOL = 2e-5
OPTIONS = (
    "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "8",
    "--max-num-batched-tokens", "128", "--scheduling-policy", "priority", "--served-model-name", "model",
    "--enable-prompt-tokens-details", "--enable-server-load-tracking", "--enable-scale-out",
)  # fmt: skip
SIDES = {
    "torchtitan": ("torchtitan", "TitanForCausalLM"),
    "attention groups": ("torchtitan", "TitanForCausalLM", "--tp", "2", "--attention-dp", "2"),
    "vllm": ("vllm", "Qwen3ForCausalLM"),
}
"""model_impl, the class that it loads, and options."""
OWN = (
    "id",
    "created",
    "created_at",
    "completed_at",
    "request_id",
    "system_fingerprint",
    "root",
    "parent",
    "permission",
)
"""Fields that differ from request to request."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("features") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def answers(model: Path, serve: Callable[..., Any]) -> dict[str, list[tuple[int, Any]]]:
    """Status and JSON of every request of the table, by side."""
    given: dict[str, list[tuple[int, Any]]] = {}
    for side, (impl, loaded, *more) in SIDES.items():
        log = model.parent / f"{side}.log"
        with (
            serve(model, log, "--model-impl", impl, *more, *OPTIONS) as url,
            httpx.Client(base_url=url, timeout=60) as client,
        ):
            assert f"Resolved architecture: {loaded}" in log.read_text()
            given[side] = [ask(client, path, body) for each in SAME for path, body in each.requests]
    return given


def ask(client: httpx.Client, path: str, body: Any) -> tuple[int, Any]:
    answer = client.get(path) if body is None else client.post(path, json={"model": "model", **body})
    return answer.status_code, answer.json() if answer.content else None


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two answers differ by more than rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{at}: {sorted(a)} and {sorted(b)}"]
        return [line for key in a if key not in OWN for line in differences(a[key], b[key], f"{at}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            line
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for line in differences(x, y, f"{at}[{i}]")
        ]
    if isinstance(a, float) and isinstance(b, float):
        return [] if math.isclose(a, b, rel_tol=0, abs_tol=ATOL) else [f"{at}: {a} and {b}"]
    return [] if a == b else [f"{at}: {a!r} and {b!r}"]


WITH_REQUESTS = [each for each in SAME if each.requests]


@pytest.mark.parametrize(
    "feature", WITH_REQUESTS, ids=[each.name.split()[0].strip(":,") for each in WITH_REQUESTS]
)
def test_it_works_as_in_vllm(feature: Same, answers: dict[str, list[tuple[int, Any]]]) -> None:
    first = sum(len(each.requests) for each in itertools.takewhile(lambda each: each is not feature, SAME))
    for at, (path, body) in enumerate(feature.requests, first):
        expected, theirs = answers["vllm"][at]
        assert expected == 200, (path, body, theirs)
        for side in ("torchtitan", "attention groups"):
            status, ours = answers[side][at]
            assert status == 200, (side, path, body, ours)
            assert not differences(ours, theirs), (side, path, body)


def test_the_prefix_cache_was_used(answers: dict[str, list[tuple[int, Any]]]) -> None:
    used = [
        (answer.get("usage") or {}).get("prompt_tokens_details") or {}
        for _, answer in answers["torchtitan"]
        if isinstance(answer, dict)
    ]
    assert max(details.get("cached_tokens") or 0 for details in used) >= 256


def test_embeddings_and_scores_are_those_of_transformers(model: Path) -> None:
    from titan_bridge.engine.run.offline import engine

    prompts = [[5, 9, 13, 200, 31], [7, 8, 9], list(range(40, 240))]
    reference = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = [reference(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts]
    expected = [torch.nn.functional.normalize(last, dim=0) for last in hidden]
    config = InferConfig(
        model=str(model),
        dtype="float32",
        max_model_len=256,
        vllm={"enforce_eager": True, "runner": "pooling"},
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    with engine(config) as (llm, workers, _):
        assert workers[0]["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
        given = [torch.tensor(output.outputs.embedding) for output in llm.embed(inputs, use_tqdm=False)]
        (score,) = llm.score("def main(", "class A:", use_tqdm=False)
        texts = llm.embed(["def main(", "class A:"], use_tqdm=False)
    for ours, theirs in zip(given, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    first, second = (torch.tensor(output.outputs.embedding) for output in texts)
    assert math.isclose(score.outputs.score, float(first @ second), abs_tol=1e-5)


def test_ngram_speculation_has_the_same_tokens(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from titan_bridge.reference import load_reference

    prompt = "def main(x):\n    return main(x)\n" * 3
    code = cli.main([
        "generate", str(model), "--prompt", prompt, "--max-tokens", "40", "--dtype", "float32", "--json",
        "--max-model-len", "256", "--enforce-eager", "--set", "generate.ignore_eos=true", "--speculative-config",
        '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}',
    ])  # fmt: skip
    assert code == 0
    told = json.loads(capsys.readouterr().out)
    (completion,) = told["completions"]
    asked, said = completion["prompt_token_ids"], completion["token_ids"]
    expected_LV = load_reference(model).logprobs([*asked, *said])
    assert said == expected_LV[len(asked) - 1 : -1].argmax(-1).tolist()
    assert 0 < told["drafts"]["accepted"] <= told["drafts"]["draft"]


def test_a_kv_connector_gives_back_what_it_was_given(tmp_path: Path) -> None:
    """gpt-oss, whose layers with and without a window then share a group of the cache."""
    from vllm import SamplingParams

    from titan_bridge.engine.run.offline import engine
    from titan_bridge.reference import load_reference

    model = make_checkpoint(tmp_path / "gpt_oss", "gpt_oss")
    folder = {"shared_storage_path": str(tmp_path / "cache")}
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": folder,
    }
    config = InferConfig(
        model=str(model),
        dtype="float32",
        max_model_len=512,
        vllm={"enforce_eager": True, "enable_prefix_caching": False, "kv_transfer_config": connector},
    )
    reference = load_reference(model)
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=0)
    with engine(config) as (llm, workers, _):
        assert workers[0]["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
        for cached in (0, 256):
            (output,) = llm.generate([{"prompt_token_ids": LONG}], sampling, use_tqdm=False)
            assert output.num_cached_tokens == cached
            (said,) = output.outputs
            expected_LV = reference.logprobs([*LONG, *said.token_ids])[len(LONG) - 1 : -1]
            assert list(said.token_ids) == expected_LV.argmax(-1).tolist()
            given = torch.tensor([next(iter(row.values())).logprob for row in said.logprobs])
            assert torch.allclose(given, expected_LV.max(-1).values, rtol=0, atol=ATOL)
