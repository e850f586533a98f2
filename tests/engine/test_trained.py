"""A checkpoint that `titan-bridge train` wrote, served without conversion at several layouts, and converted for
transformers, has the same numbers, and each rank reads its own slices and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.forked_training import forked_training
from titan_bridge import cli, parity
from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.engine.run.ranks import generate
from titan_bridge.mesh import Sizes
from titan_bridge.model_layout import layout
from titan_bridge.run_folder import TrainedRun, find
from titan_bridge.sharding.layout import Layout
from titan_bridge.train.progress import read_metrics

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

TOML = """
lr = 3e-3
[model]
family = "{family}"
[model.sizes]
hidden_size = 128
num_hidden_layers = 2
num_attention_heads = 4
{sizes}
[data]
tokenizer = "bytes"
[trainer]
activation_checkpoint = "none"
training = {{ steps = 60, seq_len = 64, local_batch_size = 4 }}
lr_scheduler.warmup_steps = 5
metrics.log_freq = 10
checkpoint.interval = 60
"""
GROUPED = """num_key_value_heads = 2
head_dim = 32
"""
EXPERTS = """num_experts_per_tok = 2
moe_intermediate_size = 64
"""
LATENT = """intermediate_size = 128
[model.sizes.other]
q_lora_rank = 48
kv_lora_rank = 32
qk_nope_head_dim = 32
qk_rope_head_dim = 32
v_head_dim = 24
first_k_dense_replace = 1
n_routed_experts = 4
n_group = 2
topk_group = 1
"""
SINKS = """intermediate_size = 64
num_experts = 4
num_experts_per_tok = 2
[model.sizes.other]
sliding_window = 48
"""
RUNS = {
    "llama3": (GROUPED + "intermediate_size = 256", "parallel.dp=2"),
    "qwen3": (GROUPED + "num_experts = 4\n" + EXPERTS, "parallel={dp=2,ep=2}"),
    "deepseek_v3": (EXPERTS + LATENT, "parallel={dp=2,ep=2}"),
    "gpt_oss": (GROUPED + SINKS, "parallel.dp=2"),
}
CASES = [  # the demo has tp=2, and tp=2 ep=2 for the mixture of experts
    ("llama3", Parallel(dp=2, dense="shard")),
    ("qwen3", Parallel()),
    ("qwen3", Parallel(tp=2)),
    ("qwen3", Parallel(dp=2, ep=2)),
    ("deepseek_v3", Parallel(tp=2, ep=2)),
    ("gpt_oss", Parallel()),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A training run and what reads it besides the engine."""

    run: TrainedRun
    references: dict[str, parity.Logprobs]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """A run on two ranks that has learnt something, so that its log-probabilities are not flat; once a family."""
    made: dict[str, Trained] = {}

    def once(family: str) -> Trained:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            sizes, parallel = RUNS[family]
            file, out, hf = folder / "a.toml", folder / "out", folder / "hf"
            file.write_text(TOML.format(family=family, sizes=sizes))
            with forked_training():
                assert cli.main(["train", str(file), "--out", str(out), "--set", parallel]) == 0
            losses = [entry["loss"] for entry in read_metrics(out / "metrics.jsonl").values()]
            assert losses[-1] <= losses[0] * 2 / 3
            run = find(out)
            assert cli.main(["reshard", str(run.directory), str(hf), "--to", "hf", "--verify"]) == 0
            references = dict(parity.references(hf))
            references["TorchTitan on the DCP"] = dict(parity.references(run.folder))["TorchTitan"]
            assert sorted(references) == ["TorchTitan", "TorchTitan on the DCP", "transformers"]
            made[family] = Trained(run=run, references=references)
        return made[family]

    return once


@pytest.mark.parametrize(("family", "parallel"), CASES, ids=str)
def test_a_dcp_is_served_as_it_lies_with_the_numbers_of_its_hugging_face_twin(
    trained: Callable[[str], Trained],
    family: str,
    parallel: Parallel,
    forked_ranks: None,
    no_orphans: None,
) -> None:
    model = trained(family)
    before = files_in(model.run.folder)
    assert not any(name.endswith(".safetensors") for name in before)
    config = InferConfig(
        model=str(model.run.folder),
        dtype="float32",
        max_model_len=parity.LONGEST,
        parallel=parallel,
        vllm={**parity.ENGINE_OPTIONS, "enforce_eager": True},
    )
    outcome = generate(config, *parity.rounds(parity.prompts(model.run.record.hf_config["vocab_size"])))
    assert files_in(model.run.folder) == before, "served without a conversion step"

    sizes = Sizes(dp=parallel.dp, tp=parallel.tp, ep=parallel.ep)
    assert outcome.killed_ranks == ()
    assert len(outcome.workers) == sizes.world
    hf = model.run.record.hf_config
    served, whole = (layout(hf, s, parallel.dense, dtype=torch.float32) for s in (sizes, Sizes()))
    for worker in outcome.workers:
        assert worker["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
        assert {axis: worker["sizes"][axis] for axis in ("tp", "ep")} == {"tp": sizes.tp, "ep": sizes.ep}
        rank = worker["dp_rank"] * sizes.tp + worker["rank"] % sizes.tp
        loaded = worker["loaded"]
        print(f"{family} {sizes} rank {rank}: {loaded}")
        assert loaded["bytes_read"] == loaded["bytes_planned"] == local_bytes(served, rank)
        assert loaded["bytes_total"] == local_bytes(whole, 0)

    completions = [dataclasses.asdict(completion) for completion in outcome.completions]
    assert sum(completion["cached_tokens"] for completion in completions) > 0
    for name, logprobs in model.references.items():
        found = parity.compare(completions, name, logprobs)
        print(f"{family} {sizes}: {name} max {found.max:.1e} mean {found.mean:.1e} over {found.tokens}")
        assert found.tokens > 1500
        assert found.max <= (1e-4 if name == "transformers" else 1e-5)
        assert found.diverged is None


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of every file, by its path in the folder."""
    found = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def local_bytes(where: Layout, rank: int) -> int:
    """Bytes that a rank holds in float32."""
    return sum(4 * math.prod(where.local_shape(fqn, rank)) for fqn in where.params)
