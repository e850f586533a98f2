"""Dense weights sharded over dp: the same numbers bit for bit, and less memory on each rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_bridge import cpu
from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.engine.run.offline import complete, engine
from titan_bridge.engine.run.ranks import generate
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]


# vLLM steps the dp ranks of a mixture of experts together; those of a dense model only because we ask for it.
@pytest.mark.parametrize(("family", "tied"), [("qwen3_moe", False), ("qwen3", True)])
def test_sharded_dense_weights_give_the_bits_of_one_rank_that_has_them_all(
    tmp_path: Path,
    family: str,
    tied: bool,
    monkeypatch: pytest.MonkeyPatch,
    forked_ranks: None,
    no_orphans: None,
) -> None:
    model = make_checkpoint(tmp_path / family, family, tie_word_embeddings=tied, hidden_size=256)
    # Both ranks get prompts of their own and finish at different times, so that each idles while the other decodes.
    prompts = [[3, 5, 7], list(range(100, 190)), [11] * 40, list(range(9))]
    sampling = [
        {"temperature": 0, "max_tokens": 6 + 9 * i, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0}
        for i in range(len(prompts))
    ]

    def config(parallel: Parallel, **options: object) -> InferConfig:
        # One sequence a step: which requests share a batch is a matter of time, and bits of the shape of a batch.
        few = {
            "enforce_eager": True,
            "max_num_batched_tokens": 64,
            "max_num_seqs": 1,
            "num_gpu_blocks_override": 32,
        }
        return InferConfig(
            model=str(model), dtype="float32", parallel=parallel, max_model_len=256, vllm={**few, **options}
        )

    sharded = generate(config(Parallel(dp=2, dense="shard")), prompts, sampling)
    assert sharded.model_class == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
    assert not sharded.killed_ranks
    with monkeypatch.context() as patch:
        patch.setenv(
            "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
        )  # the scheduler runs here, which saves an import of vLLM
        patch.setenv(
            cpu.BIND, str(cpu.cores()[0].cpu)
        )  # as many threads as each of two ranks: bits depend on it
        with engine(config(Parallel(), distributed_executor_backend="mp")) as (llm, (whole,), _):
            completions, _ = complete(llm, prompts, sampling)
    assert list(sharded.completions) == completions
    after = max(worker["local_bytes"] for worker in sharded.workers)
    print(f"bytes of parameters a rank: {whole['local_bytes']:,} whole, {after:,} sharded")
    # Experts are dense here (ep=1), so that all weights are halved but those rows that do not divide.
    assert after <= 0.51 * whole["local_bytes"]


def test_a_rank_without_a_prompt_needs_no_tokenizer(
    tmp_path: Path, forked_ranks: None, no_orphans: None
) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3", tokenizer=False)
    config = InferConfig(
        model=str(model),
        dtype="float32",
        parallel=Parallel(dp=2, dense="shard"),
        max_model_len=64,
        vllm={"enforce_eager": True, "num_gpu_blocks_override": 32, "skip_tokenizer_init": True},
    )
    outcome = generate(config, [[3, 5, 7]], {"temperature": 0, "max_tokens": 4, "ignore_eos": True})
    assert [len(completion.token_ids) for completion in outcome.completions] == [4]
