"""Updates of vLLM's own model: every worker gets its slices of the fused parameters, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.testing import make_checkpoint, titan_tensors

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]


def hf_tensors(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def answers(llm: Any) -> list[float]:
    """Log-probabilities of the tokens of a prompt."""
    from vllm import SamplingParams

    given = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": list(range(5, 45))}], given, use_tqdm=False)
    return [next(iter(row.values())).logprob for row in output.prompt_logprobs[1:]]


@pytest.mark.parametrize(("family", "model_class"), [("qwen3", "Qwen3"), ("qwen3_moe", "Qwen3Moe")])
def test_a_trainer_updates_vllms_own_model_at_tp_2(tmp_path, family, model_class):
    """Of a dense model every worker gets its slices; the CPU backend repacks experts, which therefore come whole."""
    from titan_bridge.engine.run.offline import engine
    from titan_bridge.engine.transfer import LLMClient, TitanTrainerInitInfo, TitanWeightSource
    from titan_bridge.engine.transfer import TitanTrainerWeightTransferEngine as Engine

    a, b = (
        make_checkpoint(tmp_path / name, family, seed=seed, dtype=torch.bfloat16, tokenizer=False)
        for seed, name in enumerate("ab")
    )
    config = InferConfig(
        model=str(a),
        model_impl="auto",
        parallel=Parallel(tp=2),
        max_model_len=128,
        vllm={
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "additional_config": {"titan": {"attach_specs": True}},
            "weight_transfer_config": {"backend": "titan"},
        },
    )
    with engine(config) as (llm, workers, _):
        module = f"vllm.model_executor.models.{family}.{model_class}ForCausalLM"
        assert workers[0]["model_class"] == module
        fresh = answers(llm)
        for read in (titan_tensors, hf_tensors):
            held = read(b)
            source = TitanWeightSource(lambda: held)  # noqa: B023  what it holds now is what is meant
            info = TitanTrainerInitInfo(rank=0, timeout_seconds=30)
            trainer = Engine.trainer_init(info, client=LLMClient(llm), source=source)
            trainer.send_weights()
            assert answers(llm) != fresh
            held = read(a)
            trainer.send_weights()
            assert answers(llm) == fresh
            # Half of everything that is sharded into each worker, fused or not, and the norms into both.
            experts = sum(tensor.nbytes for name, tensor in hf_tensors(b).items() if ".experts." in name)
            assert trainer.report.received == {
                f"engine0/{rank}": worker["local_bytes"] + experts // 2 for rank, worker in enumerate(workers)
            }
            trainer.shutdown()
