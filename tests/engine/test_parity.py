"""The engine's log-probabilities against transformers and TorchTitan's own forward, at every kind of layout."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from safetensors.torch import load_file, save_file

from tests.unit.test_examples import words_of
from titan_bridge import cli, cpu, parity
from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.models import load_hf_config
from titan_bridge.policy.schema import NO_POLICY, Policy
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128, "rope_theta": 10_000.0,
}  # fmt: skip
EXPANDED = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "head_dim": 32, "v_head_dim": 24}
SERVABLE = {"hidden_size": 256, "head_dim": 32}  # vLLM's CPU attention has no kernel for a head_dim of 16
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 scaled tied": (
        "llama3",
        {**SERVABLE, "rope_parameters": LLAMA3_SCALING, "tie_word_embeddings": True},
    ),
    "llama3": ("llama3", {**SERVABLE, "sliding_window": 48}),  # which neither reference reads
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 odd sizes": ("qwen3", {"hidden_size": 192, "head_dim": 48, "vocab_size": 777}),
    "qwen3 windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}),
    "moe": ("qwen3_moe", {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "moe plain scores": ("qwen3_moe", {"norm_topk_prob": False, "vocab_size": 777}),
    "deepseek": ("deepseek_v3", EXPANDED),
    "gpt-oss": ("gpt_oss", {"sliding_window": 48}),
}
HERE: list[tuple[str, dict[str, Any]]] = [  # in this process, which imports vLLM once
    ("llama3 scaled tied", {"pp": 2, "tp": 2}),
    ("llama3", {"tp": 2}),
    ("qwen3 windows", {"pp": 2}),
    ("qwen3 odd sizes", {"tp": 2}),
    ("moe", {}),
    ("moe plain scores", {"tp": 2}),
    ("deepseek", {"tp": 2}),
    ("gpt-oss", {"tp": 2}),
    ("qwen3 tied", {"pp": 2, "enforce_eager": False}),
    ("deepseek", {"tp": 2, "ep": 2, "enforce_eager": False}),
    ("gpt-oss", {"pp": 2, "tp": 2, "ep": 2, "enforce_eager": False}),
]
COMMANDS = [
    ("moe", "--tp 2 --ep 2"),
    ("moe", "--dp 2"),
    ("moe plain scores", "--dp 2 --ep 2"),
    ("moe", "--dp 2 --tp 2 --ep 4 --attention-tp 1"),
    ("moe", "--dp 2 --tp 2 --ep 2 --dense shard"),
    ("deepseek", "--dp 2 --pp 2 --ep 2"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: make_checkpoint(folder / name.replace(" ", "_"), family, **overrides)
        for name, (family, overrides) in MODELS.items()
    }


@pytest.mark.parametrize(("model", "options"), HERE, ids=str)
def test_engine_has_the_numbers_of_both_references(
    models: dict[str, Path],
    model: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    no_orphans: None,
) -> None:
    eager = options.get("enforce_eager", True)
    parallel = {name: size for name, size in options.items() if name != "enforce_eager"}
    facts = answer_here(models[model], parallel, monkeypatch, enforce_eager=eager)
    check(facts, parallel)
    attends_as_it_should(facts, model)


def test_a_start_that_finds_compiled_graphs_on_disk_has_the_same_numbers(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_orphans: None
) -> None:
    """Two ranks share the folder, and their graphs differ."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    parallel = {"tp": 2, "ep": 2}

    def numbers_hold() -> None:
        check(answer_here(models["moe"], parallel, monkeypatch, enforce_eager=False), parallel)

    def whole_steps() -> dict[Path, int]:
        files = tmp_path.glob("torch_compile_cache/torch_aot_compile/*/rank_*/model")
        return {file: file.stat().st_mtime_ns for file in files}

    print("first start: compiles")
    numbers_hold()
    compiled = whole_steps()
    assert len(compiled) == 2
    print("second start: loads the whole step of each rank")
    monkeypatch.setenv("VLLM_FORCE_AOT_LOAD", "1")
    numbers_hold()
    assert whole_steps() == compiled
    print("third start: finds graphs, but no whole step")
    monkeypatch.delenv("VLLM_FORCE_AOT_LOAD")
    for file in compiled:
        file.unlink()
    assert list(tmp_path.glob("torch_compile_cache/torch_aot_compile/*/inductor_cache/aotautograd/*"))
    numbers_hold()
    assert whole_steps().keys() == compiled.keys()


@pytest.mark.parametrize(("model", "options"), COMMANDS, ids=[f"{m} {o}" for m, o in COMMANDS])
def test_the_command_finds_the_numbers_of_both_references(
    models: dict[str, Path],
    model: str,
    options: str,
    capfd: pytest.CaptureFixture[str],
    forked_ranks: None,
    no_orphans: None,
) -> None:
    assert cli.main(["parity", str(models[model]), "--json", *options.split()]) == 0
    words = options.split()
    asked = {word.removeprefix("--"): int(size) for word, size in pairwise(words) if size.isdigit()}
    facts = json.loads(capfd.readouterr().out.splitlines()[-1])
    check(facts, asked)
    attends_as_it_should(facts, model)


def attends_as_it_should(facts: dict[str, Any], model: str) -> None:
    form = "expanded attention" if model == "deepseek" else "attention"
    assert facts["attention"].startswith(f"{form} with a cache of ")


def test_the_example_in_the_help_is_one_of_these_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["parity", "--help"])
    command, _, *options = words_of(capsys.readouterr().out)
    assert command == "parity"
    assert ("moe", " ".join(options)) in COMMANDS


def test_a_model_with_a_weight_that_is_nan_fails(bin_dir: Path, tmp_path: Path, no_orphans: None) -> None:
    """The difference of NaN and NaN is within no tolerance; the log names the weight, the answer the first token."""
    model = make_checkpoint(tmp_path / "nan", "qwen3", num_hidden_layers=1)
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"][7] = math.nan
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    command = [str(bin_dir / "titan-bridge"), "parity", str(model), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    facts = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert not facts["holds"]
    for row in facts["references"]:
        assert row["max"] is row["mean"] is None
        assert row["not_finite"].startswith("prompt 0 (3 tokens), position 1, token ")
        assert row["not_finite"].endswith(f": the engine says nan, {row['reference']} nan")
    assert "titan-bridge: 1 weights are NaN: norm.weight (1)\n" in done.stderr


def answer_here(
    model: Path, parallel: dict[str, int], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> dict[str, Any]:
    """What `titan-bridge parity` would say, without the start of a process that imports vLLM."""
    worker, answers = completions_here(model, parallel, monkeypatch, dtype="float32", **options)
    return {
        "model_class": worker["model_class"],
        "dtype": "float32",
        "cached_tokens": sum(answer["cached_tokens"] for answer in answers),
        "sizes": worker["sizes"],
        "attention": worker["attention"],
        "references": [
            dataclasses.asdict(parity.compare(answers, *each)) for each in parity.references(model)
        ],
    }


def completions_here(
    model: Path,
    parallel: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    *,
    dtype: Literal["float32", "bfloat16"],
    enforce_eager: bool = True,
    policy: Policy = NO_POLICY,
    **vllm: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the first worker says of itself, and the completions of the fixed prompts."""
    from titan_bridge.engine.run.offline import complete, engine

    # The scheduler runs here; workers are processes of their own anyway.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv(cpu.BIND, cpu.bind(Parallel(**parallel).workers, cpu.cores()) or "auto")
    config = InferConfig(
        model=str(model),
        dtype=dtype,
        parallel=Parallel(**parallel),
        parallelism=policy,
        max_model_len=parity.LONGEST,
        vllm={
            **parity.ENGINE_OPTIONS,
            "enforce_eager": enforce_eager,
            "distributed_executor_backend": "mp",
            **vllm,
        },
    )
    vocab_size = load_hf_config(model)["vocab_size"]
    with engine(config) as (llm, workers, _):
        completions, _ = complete(llm, *parity.rounds(parity.prompts(vocab_size)))
    assert len(workers) == config.parallel.workers
    assert workers[0]["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
    return workers[0], [dataclasses.asdict(completion) for completion in completions]


def test_a_compiled_step_from_disk_takes_the_weights_that_are_packed_now(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_orphans: None
) -> None:
    """In bfloat16 the CPU's products read packed copies, whose places in memory each start has anew."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    options = {"dtype": "bfloat16", "enforce_eager": False}
    first = completions_here(models["moe"], {}, monkeypatch, **options)[1]
    monkeypatch.setenv("VLLM_FORCE_AOT_LOAD", "1")
    second = completions_here(models["moe"], {}, monkeypatch, **options)[1]
    assert [answer["logprobs"] for answer in second] == [answer["logprobs"] for answer in first]
    assert len({logprob for answer in first for logprob in answer["logprobs"]}) > 100


def check(facts: dict[str, Any], asked: dict[str, int]) -> None:
    assert facts["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
    assert facts["dtype"] == "float32"
    assert facts["cached_tokens"] > 0
    assert facts["sizes"]["tp"] == asked.get("tp", 1)
    assert facts["sizes"]["ep"] == asked.get("ep", 1)
    assert facts["sizes"].get("pp", 1) == asked.get("pp", 1)
    assert [row["reference"] for row in facts["references"]] == ["transformers", "TorchTitan"]
    for row in facts["references"]:
        print(f"{asked}: {row['reference']} max {row['max']:.1e} mean {row['mean']:.1e}")
        assert row["max"] <= 1e-4
        assert row["tokens"] > 1500
        assert row["diverged"] is None
