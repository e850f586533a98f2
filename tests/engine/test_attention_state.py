"""What attention layers keep besides our parameters: the matrices that a latent cache derives, and sinks.

Each engine starts from a quantized checkpoint and takes other weights while it runs, live and from a directory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.unit.quantized_samples import make_fp8, make_mxfp4, multiplied_out
from titan_bridge import parity
from titan_bridge.config.schema import InferConfig
from titan_bridge.models import load_hf_config
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

LATENT = {  # the widths that vLLM's latent attention computes on CPUs
    "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "head_dim": 64, "v_head_dim": 32,
}  # fmt: skip
CASES: dict[str, tuple[Callable[..., Path], dict[str, Any], dict[str, Any]]] = {
    "deepseek_v3": (
        make_fp8,
        LATENT,
        {"block_size": 16, "additional_config": {"titan": {"mla": "latent"}}},
    ),
    "gpt_oss": (make_mxfp4, {"sliding_window": 48}, {}),
}


@pytest.mark.parametrize("family", CASES)
def test_it_is_derived_from_the_weights_that_are_served_now(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_orphans: None
) -> None:
    from titan_bridge.engine.run.offline import complete, engine

    make, fields, options = CASES[family]
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send a function to the workers
    quantized = make(tmp_path, **fields)
    other = make_checkpoint(tmp_path / "other", family, seed=1, tokenizer=False, **fields)
    config = InferConfig(
        model=str(quantized),
        dtype="float32",
        max_model_len=parity.LONGEST,
        vllm={
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "kv_cache_memory_bytes": 64 << 20,
            "weight_transfer_config": {"backend": "titan"},
            **options,
        },
    )
    with engine(config) as (llm, workers, _):
        assert workers[0]["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"

        def answers() -> list[dict[str, Any]]:
            llm.reset_prefix_cache()
            prompts = parity.prompts(load_hf_config(quantized)["vocab_size"])
            greedy = {"temperature": 0, "max_tokens": 16, "logprobs": 0, "prompt_logprobs": 0}
            greedy |= {"ignore_eos": True, "detokenize": False}
            return [dataclasses.asdict(each) for each in complete(llm, prompts, greedy)[0]]

        ((said, held),) = llm.collective_rpc(cache)
        form = f", latent attention with a cache of {held:,} bytes a token (expanded: "
        assert said.startswith(form) if family == "deepseek_v3" else not said
        started = answers()
        send(llm, other)
        sent = answers()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(quantized)})
        reloaded = answers()
    assert [name for name, _ in parity.references(quantized)] == ["TorchTitan"]
    full = multiplied_out(quantized, tmp_path / "multiplied_out")
    for model, found in ((full, started), (other, sent), (full, reloaded)):
        for name, logprobs in parity.references(model):
            difference = parity.compare(found, name, logprobs)
            print(f"{family} {model.name}: {name} max {difference.max:.1e} over {difference.tokens}")
            assert difference.tokens > 700
            assert difference.holds(1e-4, greedy=True)


def cache(worker: Any) -> tuple[str, int]:
    """On a worker: what the log says of the cache, and its bytes a token."""
    from titan_bridge.engine.model.latent import cache_form

    specs = worker.get_kv_cache_spec().values()
    held = sum(spec.page_size_bytes // spec.block_size for spec in specs)
    return cache_form(worker.model_runner.model.model, tp=1), held


def send(llm: Any, model: Path) -> None:
    """Send a checkpoint's tensors to the engine, as a trainer in this process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from titan_bridge.engine.transfer import LLMClient, TitanTrainerInitInfo, TitanWeightSource

    held = load_file(model / "model.safetensors")
    trainer = WeightTransferTrainerFactory.trainer_init(
        TitanTrainerInitInfo(rank=0, timeout_seconds=60),
        client=LLMClient(llm),
        source=TitanWeightSource(lambda: held),
    )
    trainer.send_weights()
    trainer.shutdown()
