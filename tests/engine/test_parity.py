"""The engine's log-probabilities against transformers and TorchTitan's own forward, at every kind of layout."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128, "rope_theta": 10_000.0,
}  # fmt: skip
SERVABLE = {"hidden_size": 256, "head_dim": 32}  # vLLM's CPU attention has no kernel for a head_dim of 16
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 scaled tied": (
        "llama3",
        {**SERVABLE, "rope_parameters": LLAMA3_SCALING, "tie_word_embeddings": True},
    ),
    "llama3": ("llama3", SERVABLE),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 odd sizes": ("qwen3", {"hidden_size": 192, "head_dim": 48, "vocab_size": 777}),
    "qwen3 windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}),
    "moe": ("qwen3_moe", {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "moe plain scores": ("qwen3_moe", {"norm_topk_prob": False, "vocab_size": 777}),
}
CASES = [
    ("llama3 scaled tied", ""),
    ("llama3", "--tp 2"),
    ("qwen3 tied", "--no-enforce-eager"),
    ("qwen3 windows", ""),
    ("qwen3 odd sizes", "--tp 2"),
    ("moe", ""),
    ("moe plain scores", "--tp 2"),
    ("moe", "--tp 2 --ep 2"),
    ("moe", "--tp 2 --ep 2 --no-enforce-eager"),
    ("moe", "--dp 2"),
    ("moe plain scores", "--dp 2 --ep 2"),
    ("moe", "--dp 2 --tp 2 --ep 4"),
    ("moe", "--dp 2 --tp 2 --ep 2 --dense shard"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: make_checkpoint(folder / name.replace(" ", "_"), family, **overrides)
        for name, (family, overrides) in MODELS.items()
    }


@pytest.mark.parametrize(("model", "options"), CASES, ids=[f"{m}{o}".replace(" ", "_") for m, o in CASES])
def test_engine_has_the_numbers_of_both_references(
    models: dict[str, Path], model: str, options: str, bin_dir: Path, no_orphans: None
) -> None:
    command = [str(bin_dir / "titan-bridge"), "parity", str(models[model]), "--json", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["model_class"] == "titan_bridge.engine.vllm_wrapper.TitanForCausalLM"
    assert facts["dtype"] == "float32"
    assert facts["cached_tokens"] > 0
    wanted = dict(zip(options.split()[::2], options.split()[1::2], strict=False))
    assert facts["sizes"]["tp"] == int(wanted.get("--tp", 1))
    assert facts["sizes"]["ep"] == int(wanted.get("--ep", 1))
    assert [row["reference"] for row in facts["references"]] == ["transformers", "TorchTitan"]
    for row in facts["references"]:
        print(f"{model} {options}: {row['reference']} max {row['max']:.1e} mean {row['mean']:.1e}")
        assert row["max"] <= 1e-4
        assert row["tokens"] > 1500
        assert row["diverged"] is None
