"""Engines whose groups of ranks attend for requests of their own: the numbers, random load over HTTP, new weights."""

from __future__ import annotations

import concurrent.futures
import functools
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
from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.reference import load_reference
from titan_bridge.testing import make_checkpoint
from titan_bridge.transfer import Trainer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPT = [5, 9, 13, 200]
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


def step_of_vllms_own(worker: Any) -> list[list[int]]:
    """On a worker: what it samples after a prompt that is not scheduled by groups, as in vLLM's warm-up."""
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    asked, ended = SchedulerOutput.make_empty(), SchedulerOutput.make_empty()
    request = NewRequestData(
        req_id="warm-up", prompt_token_ids=PROMPT, mm_features=[], pooling_params=None, block_ids=([1],),
        sampling_params=SamplingParams(temperature=0), num_computed_tokens=0, lora_request=None,
    )  # fmt: skip
    asked.scheduled_new_reqs = [request]
    asked.num_scheduled_tokens, asked.total_num_scheduled_tokens = {"warm-up": len(PROMPT)}, len(PROMPT)
    asked.num_common_prefix_blocks, ended.finished_req_ids = [0], {"warm-up"}
    assert worker.execute_model(asked) is None
    sampled = worker.sample_tokens(None).sampled_token_ids
    worker.execute_model(ended)
    return sampled


def test_a_step_that_knows_no_groups_is_the_same_one_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_orphans: None
) -> None:
    """vLLM warms up some GPU kernels with such steps."""
    from titan_bridge.engine.run.offline import complete, engine

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send a function to the workers
    model = make_checkpoint(tmp_path / "model", "qwen3", tokenizer=False)
    options = {"enforce_eager": True, "skip_tokenizer_init": True, "kv_cache_memory_bytes": 8 << 20}
    config = InferConfig(
        model=str(model),
        dtype="float32",
        parallel=Parallel(tp=2, attention_dp=2),
        max_model_len=64,
        vllm=options,
    )
    greedy = {"temperature": 0, "max_tokens": 1, "detokenize": False}
    with engine(config) as (llm, _, _):
        stepped = llm.collective_rpc(step_of_vllms_own)
        (completion,), _ = complete(llm, [PROMPT], greedy)
    token = int(load_reference(model).logprobs(PROMPT)[-1].argmax())
    assert stepped == [[[token]]] * 2
    assert completion.token_ids == (token,)


@dataclass(frozen=True, kw_only=True)
class Server:
    """Experts over dp=2 with tp=2, one key-value head: two groups on each dp rank, with caches of 640 tokens.

    `other` has other weights.
    """

    model: Path
    other: Path
    url: str
    log: Path

    def ask(self, prompt: list[int], tokens: int, rank: int | None = None) -> dict[str, Any]:
        """An answer of the given dp rank, or of that which vLLM takes."""
        answer = httpx.post(
            f"{self.url}/v1/completions", json=self.body(prompt, tokens), headers=to(rank), timeout=300
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def body(self, prompt: list[int], tokens: int, **options: Any) -> dict[str, Any]:
        return {
            "model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 0,
            "ignore_eos": True, "return_token_ids": True, **options,
        }  # fmt: skip

    def post(self, path: str, **body: Any) -> None:
        answer = httpx.post(f"{self.url}/{path}", json=body, timeout=300)
        assert answer.status_code == 200, answer.text

    def metric(self, name: str) -> float:
        rows = [
            row for row in httpx.get(f"{self.url}/metrics").text.splitlines() if row.startswith(f"{name}{{")
        ]
        return sum(float(row.rsplit(" ", 1)[1]) for row in rows)


def to(rank: int | None) -> dict[str, str]:
    return {} if rank is None else {"X-data-parallel-rank": str(rank)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., Any]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("groups")
    model, other = (
        make_checkpoint(folder / name, "qwen3_moe", seed=seed, num_key_value_heads=1, **MOE)
        for seed, name in enumerate("ab")
    )
    options = (
        "--dp", "2", "--tp", "2", "--ep", "4", "--attention-dp", "--dtype", "float32", "--max-model-len", "256",
        "--served-model-name", "model", "--max-num-seqs", "16", "--max-num-batched-tokens", "64",
        "--num-gpu-blocks-override", "20", "--block-size", "32", "--weight-transfer-config", '{"backend": "titan"}',
        "--async-scheduling", "--api-server-count", "1",
    )  # fmt: skip
    told = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOG_STATS_INTERVAL": "0.2"}
    with serve(model, folder / "log", *options, **told) as url:
        yield Server(model=model, other=other, url=url, log=folder / "log")


def test_the_log_says_what_groups_win_and_cost(server: Server) -> None:
    log = server.log.read_text()
    assert "Serving TorchTitan's" in log
    assert (
        "Attention data parallelism: 2 groups of 1 ranks with 640 cache tokens each, 1,280 in all; without it the "
        "same bytes hold 640" in log
    )
    assert "Asynchronous scheduling is off with attention groups" in log
    assert "Attention groups run eagerly" in log


def test_a_dp_rank_works_while_the_other_has_nothing(server: Server) -> None:
    prompt = [5, 6, 7]
    assert_answers(server.model, [(prompt, server.ask(prompt, 9, rank)) for rank in (0, 1, 1)])


def test_64_requests_at_random_on_uneven_ranks_a_quarter_aborted(server: Server) -> None:
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
        rank = int(at % 8 == 1)
        if at % 4:
            return server.ask(prompts[at], lengths[at], rank)
        body, url = server.body(prompts[at], lengths[at], stream=True), f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=to(rank), timeout=300) as answer:
            for _, _ in zip(range(1 + at % 5), answer.iter_lines(), strict=False):
                pass
        return None

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(one, range(64)))
    assert_answers(server.model, zip(prompts, answers, strict=True))
    assert server.metric("vllm:num_preemptions_total") > 0
    assert server.metric("vllm:prefix_cache_hits_total") > 0
    wait_until(
        lambda: not server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")
    )
    used = re.findall(r"cache in use: (\d+) \+ \d+ [\d.]+%, (\d+) \+", server.log.read_text())
    assert any(int(first) and int(second) for first, second in used), "both groups had requests"


def test_new_weights_reach_all_groups_at_once(server: Server) -> None:
    """While requests of both groups run; no prefix of the old weights is left in either cache."""
    assert_serves(server, server.model)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(server.ask, [at] * 9, 150) for at in range(8)]
        send(server, server.other)
        assert_serves(server, server.other)
        assert all(len(each.result()["token_ids"]) == 150 for each in running)
    send(server, server.model)
    assert_serves(server, server.model)


def test_weights_of_a_folder_reach_all_groups(server: Server) -> None:
    """While ranks step in lockstep, with requests of their own or for the others' sake."""
    for model in (server.other, server.model):
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            running = [pool.submit(server.ask, [at] * 9, 150, 0) for at in range(3)]
            for each in (server.model, server.other, model):
                server.post("collective_rpc", method="reload_weights", kwargs={"weights_path": str(each)})
            assert all(len(each.result()["token_ids"]) == 150 for each in running)
        server.post("reset_prefix_cache")
        assert_serves(server, model)


@pytest.mark.parametrize(
    ("stop", "go"),
    [("pause?mode=keep", "resume"), ("pause?mode=abort", "resume"), ("sleep?level=0&mode=keep", "wake_up")],
)
def test_all_groups_stop_and_go_on(server: Server, stop: str, go: str) -> None:
    before = server.metric(TOKENS)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(server.ask, [at] * 9, 120, at % 2) for at in range(8)]
        wait_until(lambda: server.metric(TOKENS) > before)
        server.post(stop)
        wait_until(lambda: at_rest(server))
        ended = [each.done() for each in running]
        server.post(go)
        lengths = [len(each.result()["token_ids"]) for each in running]
    if "abort" in stop:
        assert min(lengths) < 120
    else:
        assert not any(ended)
        assert lengths == [120] * 8
    assert_serves(server, server.model)


TOKENS = "vllm:generation_tokens_total"


def at_rest(server: Server) -> bool:
    seen = server.metric(TOKENS)
    time.sleep(0.5)
    return server.metric(TOKENS) == seen


def assert_serves(server: Server, model: Path) -> None:
    """Prompts of several blocks have the answers of these weights, from both dp ranks."""
    prompts = [[(7 * i + 3 * j) % 700 for j in range(80)] for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda at: server.ask(prompts[at], 8, at % 2), range(8)))
    assert_answers(model, zip(prompts, answers, strict=True))


reference_of = functools.cache(load_reference)


def send(server: Server, model: Path) -> None:
    with Trainer(reference_of(model).model, server.url) as trainer:
        trainer.send(model.name)
        trainer.verify()


def assert_answers(model: Path, given: Any) -> None:
    """Tokens and log-probabilities of whole answers are those of TorchTitan's own forward."""
    reference, worst, seen = reference_of(model), 0.0, 0
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


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
