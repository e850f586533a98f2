"""Dense weights sharded over dp: the same numbers bit for bit, and less memory on each rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.engine.ranks import Outcome, generate
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]


# vLLM steps the dp ranks of a mixture of experts together; those of a dense model only because we ask for it.
@pytest.mark.parametrize(("family", "tied"), [("qwen3_moe", False), ("qwen3", True)])
def test_sharded_dense_weights_give_the_same_bits(
    tmp_path: Path, family: str, tied: bool, no_orphans: None
) -> None:
    model = make_checkpoint(tmp_path / family, family, tie_word_embeddings=tied, hidden_size=256)
    # Both ranks get prompts of their own and finish at different times, so that each idles while the other decodes.
    prompts = [[3, 5, 7], list(range(100, 190)), [11] * 40, list(range(9))]
    sampling = [
        {"temperature": 0, "max_tokens": 6 + 9 * i, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0}
        for i in range(len(prompts))
    ]

    def run(dense: str) -> Outcome:
        config = InferConfig(
            model=str(model),
            dtype="float32",
            parallel=Parallel(dp=2, dense=dense),  # type: ignore[arg-type]
            max_model_len=256,
            # One sequence a step: which requests share a batch is a matter of time, and bits of the shape of a batch.
            vllm={"enforce_eager": True, "max_num_batched_tokens": 64, "max_num_seqs": 1},
        )
        return generate(config, prompts, sampling)

    whole, sharded = run("replicate"), run("shard")
    for outcome in (whole, sharded):
        assert outcome.model_class == "titan_bridge.engine.vllm_wrapper.TitanForCausalLM"
        assert not outcome.killed_ranks
    assert sharded.completions == whole.completions
    before, after = (max(w["local_bytes"] for w in o.workers) for o in (whole, sharded))
    print(f"bytes of parameters a rank: {before:,} replicated, {after:,} sharded")
    # Experts are dense here (ep=1), so that all weights are halved but those rows that do not divide.
    assert after <= 0.51 * before
