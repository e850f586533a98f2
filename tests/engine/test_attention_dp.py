"""Engines whose groups of ranks attend for requests of their own: the numbers, random load over HTTP, new weights."""

from __future__ import annotations

import concurrent.futures
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.engine.test_attention_state import LATENT
from tests.engine.test_parity import answer_here, check
from titan_bridge.reference import load_reference
from titan_bridge.testing import make_checkpoint
from titan_bridge.transfer import Trainer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MOE = {"num_hidden_layers": 3, "mlp_only_layers": [1]}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "groups of two": ("qwen3", {"num_key_value_heads": 2}, {"tp": 4, "attention_dp": True}, {}),
    "experts over tp": ("qwen3_moe", {**MOE, "num_key_value_heads": 1}, {"tp": 2, "ep": 2, "attention_dp": True}, {}),
    "experts cut": ("qwen3_moe", {**MOE, "num_key_value_heads": 2}, {"tp": 2, "attention_dp": 2}, {}),
    "latent": (
        "deepseek_v3", LATENT, {"tp": 2, "attention_dp": True},
        {"additional_config": {"titan": {"mla": "latent"}}, "block_size": 16, "enable_prefix_caching": False,
         "max_num_batched_tokens": 1024},
    ),
}  # fmt: skip
"""Family, fields of its config, degrees, and vLLM's options."""


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_both_references(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_orphans: None
) -> None:
    family, fields, parallel, options = CASES[case]
    model = make_checkpoint(tmp_path / "model", family, **fields)  # type: ignore[arg-type]
    facts = answer_here(model, parallel, monkeypatch, **options)
    if case == "latent":  # on CPUs without a prefix cache
        assert facts["cached_tokens"] == 0
        facts["cached_tokens"] = 1
    check(facts, parallel)


@dataclass(frozen=True, kw_only=True)
class Server:
    """One key-value head over tp=2, two groups; a cache of 1,280 tokens each. `other` has other weights."""

    model: Path
    other: Path
    url: str
    log: Path

    def ask(self, prompt: list[int], tokens: int, **options: Any) -> dict[str, Any]:
        answer = httpx.post(
            f"{self.url}/v1/completions", json=self.body(prompt, tokens, **options), timeout=300
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def body(self, prompt: list[int], tokens: int, **options: Any) -> dict[str, Any]:
        return {
            "model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 0,
            "ignore_eos": True, "return_token_ids": True, **options,
        }  # fmt: skip

    def metric(self, name: str) -> float:
        rows = [
            row for row in httpx.get(f"{self.url}/metrics").text.splitlines() if row.startswith(f"{name}{{")
        ]
        return sum(float(row.rsplit(" ", 1)[1]) for row in rows)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., Any]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("groups")
    model, other = (
        make_checkpoint(folder / name, "qwen3", seed=seed, num_key_value_heads=1)
        for seed, name in enumerate("ab")
    )
    options = (
        "--tp", "2", "--attention-dp", "--dtype", "float32", "--max-model-len", "256", "--served-model-name", "model",
        "--max-num-seqs", "16", "--max-num-batched-tokens", "64", "--num-gpu-blocks-override", "40",
        "--block-size", "32", "--weight-transfer-config", '{"backend": "titan"}', "--async-scheduling",
    )  # fmt: skip
    told = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOG_STATS_INTERVAL": "0.2"}
    with serve(model, folder / "log", *options, **told) as url:
        yield Server(model=model, other=other, url=url, log=folder / "log")


def test_the_log_says_what_groups_win_and_cost(server: Server) -> None:
    log = server.log.read_text()
    assert "Serving TorchTitan's" in log
    assert (
        "Attention data parallelism: 2 groups of 1 ranks with 1,280 cache tokens each, 2,560 in all; without it the "
        "same bytes hold 1,280" in log
    )
    assert "Asynchronous scheduling is off with attention groups" in log
    assert "Attention groups run eagerly" in log


def test_64_requests_at_random_a_quarter_aborted(server: Server) -> None:
    chance = random.Random(5)
    prefixes = [[chance.randrange(3, 700) for _ in range(64)] for _ in range(3)]
    prompts = []
    for _ in range(64):
        own = [chance.randrange(3, 700) for _ in range(chance.randrange(1, 90))]
        prompts.append(chance.choice(prefixes) + own if chance.random() < 0.5 else own)
    waits = [chance.random() * 3 for _ in prompts]
    lengths = [chance.randrange(20, 90) for _ in prompts]

    def one(at: int) -> dict[str, Any] | None:
        time.sleep(waits[at])
        if at % 4:
            return server.ask(prompts[at], lengths[at])
        body = server.body(prompts[at], lengths[at], stream=True)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as answer:
            for _, _ in zip(range(1 + at % 5), answer.iter_lines(), strict=False):
                pass
        return None

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(one, range(64)))
    assert_answers(server.model, zip(prompts, answers, strict=True))
    assert server.metric("vllm:num_preemptions_total") > 0
    assert server.metric("vllm:prefix_cache_hits_total") > 0
    wait_until_idle(server)
    used = re.findall(r"cache in use: (\d+) \+ \d+ [\d.]+%, (\d+) \+", server.log.read_text())
    assert any(int(first) and int(second) for first, second in used), "both groups had requests"


def test_new_weights_reach_all_groups_at_once(server: Server) -> None:
    """While requests of both groups run; no prefix of the old weights is left in either cache."""
    prompts = [[(7 * i + 3 * j) % 700 for j in range(80)] for i in range(8)]

    def answers() -> list[dict[str, Any]]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda prompt: server.ask(prompt, 8), prompts))

    assert_answers(server.model, zip(prompts, answers(), strict=True))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(server.ask, [at] * 9, 150) for at in range(8)]
        send(server, server.other)
        assert_answers(server.other, zip(prompts, answers(), strict=True))
        assert all(len(each.result()["token_ids"]) == 150 for each in running)
    send(server, server.model)
    assert_answers(server.model, zip(prompts, answers(), strict=True))
    assert httpx.post(f"{server.url}/reset_prefix_cache").status_code == 200


def send(server: Server, model: Path) -> None:
    with Trainer(load_reference(model).model, server.url) as trainer:
        trainer.send(model.name)
        trainer.verify()


def assert_answers(model: Path, given: Any) -> None:
    """Tokens and log-probabilities of whole answers are those of TorchTitan's own forward."""
    reference, worst, seen = load_reference(model), 0.0, 0
    for prompt, answer in given:
        if answer is None:
            continue
        tokens = answer["token_ids"]
        expected_LV = reference.logprobs([*prompt, *tokens])[len(prompt) - 1 : -1]
        assert tokens == expected_LV.argmax(-1).tolist()
        own = expected_LV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, float((own - torch.tensor(answer["logprobs"]["token_logprobs"])).abs().max()))
        seen += len(tokens)
    print(f"{seen} tokens, largest difference {worst:.1e}")
    assert worst <= 1e-4


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") or server.metric("vllm:num_requests_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
