"""`vllm serve --model-impl torchtitan` over HTTP, driven by the openai client as a deployment drives it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch

from titan_bridge.reference import load_reference
from titan_bridge.testing import make_checkpoint, make_run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]


@dataclass(frozen=True, kw_only=True)
class Server:
    model: str
    url: str
    client: openai.OpenAI
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., Any]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("http")
    model = str(make_run(folder / "out", make_checkpoint(folder / "moe", "qwen3_moe")))
    options = (
        "--model-impl", "torchtitan", "--tensor-parallel-size", "2", "--enable-expert-parallel",
        "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--shutdown-timeout", "2",
    )  # fmt: skip
    vllm = (str(Path(sys.executable).parent / "vllm"), "serve")
    log = folder / "server.log"
    with serve(model, log, *options, by=vllm) as url:
        yield Server(
            model=model, url=url, client=openai.OpenAI(base_url=f"{url}/v1", api_key="none"), log=log
        )


def test_our_class_serves(server: Server) -> None:
    log = server.log.read_text()
    assert "Resolved architecture: TitanForCausalLM" in log
    assert "Serving TorchTitan's Qwen3Model" in log


def test_a_training_run_serves_under_the_name_that_was_typed(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == [server.model]


def test_logprobs_are_torchtitans_own(server: Server) -> None:
    answer = server.client.completions.create(
        model=server.model, prompt=[5, 9, 13, 200, 31], max_tokens=8, temperature=0, logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    choice = answer.choices[0]
    tokens = choice.token_ids  # type: ignore[attr-defined]  # vLLM's addition
    expected_LV = load_reference(server.model).logprobs([5, 9, 13, 200, 31, *tokens])
    rows = torch.arange(4, 4 + len(tokens))
    assert choice.logprobs is not None
    given = torch.tensor(choice.logprobs.token_logprobs)
    assert torch.allclose(given, expected_LV[rows, torch.tensor(tokens)], atol=1e-4)
    assert tokens == expected_LV[rows].argmax(-1).tolist()


def test_chat_and_streaming_say_the_same(server: Server) -> None:
    messages = [{"role": "user", "content": "def main():"}]
    whole = server.client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=24, temperature=0
    )
    stream = server.client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=24, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 2
    assert "".join(pieces) == whole.choices[0].message.content


def test_32_requests_at_once_answer_as_one_by_one(server: Server) -> None:
    prompts = [[(7 * i + 3 * j) % 700 for j in range(5 + i % 11)] for i in range(32)]

    def ask(prompt: list[int]) -> str:
        options = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
        return server.client.completions.create(model=server.model, prompt=prompt, **options).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, prompts))
    assert together[::8] == [ask(prompt) for prompt in prompts[::8]]


def test_a_client_that_hangs_up_leaves_the_server_well(server: Server) -> None:
    stream = server.client.completions.create(
        model=server.model,
        prompt="import",
        max_tokens=400,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 30
    while "vllm:num_requests_running{" in (text := httpx.get(f"{server.url}/metrics").text):
        (line,) = [row for row in text.splitlines() if row.startswith("vllm:num_requests_running{")]
        if float(line.rsplit(" ", 1)[1]) == 0:
            break
        assert time.monotonic() < deadline, line
        time.sleep(0.2)
    assert (
        server.client.completions.create(model=server.model, prompt="x", max_tokens=2).choices[0].text
        is not None
    )


def command(process: psutil.Process) -> str:
    """What it was started with; nothing of one that has ended and that nobody has waited for."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def test_a_server_ends_although_a_worker_stands_still(server: Server) -> None:
    """And with it those who wait for that worker. The last test of this server."""
    port = server.url.rpartition(":")[2]
    (process,) = [each for each in psutil.Process().children() if port in command(each).split()]
    everyone = [each for each in (process, *process.children(recursive=True)) if command(each)]
    workers = [each for each in everyone if "VLLM::Worker" in command(each)]
    shared = {
        part.path for each in everyone for part in each.memory_maps() if part.path.startswith("/dev/shm/")
    }
    still = next(each for each in workers if "TP1" in command(each))
    try:
        stream = server.client.completions.create(
            model=server.model,
            prompt=[5, 9, 13],
            max_tokens=400,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))  # held, as by a client that waits
        still.suspend()
        process.terminate()
        deadline = time.monotonic() + 90
        while process.status() != psutil.STATUS_ZOMBIE:  # waited for by whoever started it
            assert time.monotonic() < deadline
            time.sleep(0.1)
        gone, left = psutil.wait_procs([each for each in workers if each != still], timeout=60)
        assert (len(gone), left) == (1, [])
    finally:
        still.kill()
        for path in shared:  # which a killed engine leaves
            Path(path).unlink(missing_ok=True)
