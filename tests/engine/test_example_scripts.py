"""The programs in scripts/examples/ do what they say, with the real engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from tests.conftest import ROOT
from titan_bridge.ports import free_port
from titan_bridge.reference import load_reference
from titan_bridge.testing import make_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

EXAMPLES = ROOT / "scripts/examples"
SMALL = ("model.sizes.num_hidden_layers=1", "trainer.training.steps=4", "trainer.checkpoint.interval=2")


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def test_examples_are_short() -> None:
    lengths = {path.name: path.read_text().count("\n") for path in EXAMPLES.iterdir() if path.is_file()}
    assert len(lengths) >= 4
    assert {name: lines for name, lines in lengths.items() if lines >= 60} == {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of `train_then_serve.sh`, and what it printed."""
    out = tmp_path_factory.mktemp("trained") / "out"
    sets = [part for key in SMALL for part in ("--set", key)]
    done = run("bash", EXAMPLES / "train_then_serve.sh", out, *sets, PYTHON=sys.executable)
    return out, done.stdout


def test_train_then_serve_and_ask(trained: tuple[Path, str]) -> None:
    out, printed = trained
    assert sorted(path.name for path in (out / "checkpoint").glob("step-*")) == ["step-2", "step-4"]
    assert "--- 'def __init__(self'\n" in printed
    assert "--- 'import '\n" in printed
    assert "Serving TorchTitan's Llama3Model" in (out / "server.log").read_text()


def test_offline_batch(trained: tuple[Path, str], tmp_path: Path) -> None:
    prompts = ["import os", "def f(x):", "class A"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    files = (tmp_path / "prompts.txt", tmp_path / "answers.jsonl")
    options = ("--max-tokens", "6", "--dtype", "float32")
    run(sys.executable, EXAMPLES / "offline_batch.py", trained[0], *files, *options)
    answers = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.txt"]
    reference = load_reference(trained[0])
    tokenizer = AutoTokenizer.from_pretrained(trained[0] / "checkpoint")
    for answer in answers:
        asked, tokens = tokenizer(answer["prompt"])["input_ids"], answer["tokens"]
        assert tokenizer.decode(tokens) == answer["text"]
        logprobs_LV = reference.logprobs(asked + tokens)[len(asked) - 1 : -1]
        assert logprobs_LV.argmax(-1).tolist() == tokens
        assert abs(logprobs_LV.amax(-1).sum().item() - answer["logprob"]) <= 1e-4


def test_a_family_of_ones_own(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=384, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=None, dtype=torch.float32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15).add_(1.0 if "norm" in name else 0.0)
    model.save_pretrained(tmp_path)
    make_tokenizer(384, max_length=256).save_pretrained(tmp_path)
    done = run(sys.executable, EXAMPLES / "own_family.py", "parity", tmp_path, "--json")
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
    assert {row["reference"] for row in facts["references"]} == {"TorchTitan", "transformers"}
    assert all(row["max"] <= 1e-4 and row["tokens"] > 500 for row in facts["references"]), facts


def test_live_weights(trained: tuple[Path, str], serve: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--enforce-eager", "--dtype", "float32", "--served-model-name", "it")
    transfer = ("--weight-transfer-config", json.dumps({"backend": "titan"}))
    with serve(trained[0], tmp_path / "log", *options, *transfer, VLLM_SERVER_DEV_MODE="1") as url:
        torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
        done = run(sys.executable, *torchrun, EXAMPLES / "live_weights.py", trained[0], "--url", url)
        assert httpx.get(f"{url}/weight_info").json() == {"weight_version": "step 2"}
    losses = [float(loss) for loss in re.findall(r"step \d: loss ([\d.]+), ", done.stdout)]
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
