"""LoRA adapters on TorchTitan's linear layers: several in a batch have the numbers of checkpoints that they are merged
into, come and go while the engine runs, and are refused by name where they would be left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lora_samples import PREFIX, make_adapter, merged, write_adapter
from titan_bridge import cpu
from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.reference import load_reference
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

PROMPT = list(range(7, 47))
EXPANDED = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "head_dim": 32, "v_head_dim": 24}
CASES: list[tuple[str, dict[str, Any], dict[str, int], Any]] = [
    ("qwen3", {}, {}, "float32"),
    ("deepseek_v3", EXPANDED, {"tp": 2, "ep": 2}, "float32"),
    ("gpt_oss", {}, {"pp": 2, "tp": 2}, "float32"),
    ("llama3", {"hidden_size": 256, "head_dim": 32}, {"tp": 2}, "bfloat16"),
]


def answers(llm: Any, adapters: Sequence[Any]) -> list[list[float]]:
    """Log-probabilities of the tokens of a prompt, once with each adapter, all in one batch."""
    from vllm import SamplingParams

    given = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": PROMPT} for _ in adapters]
    outputs = llm.generate(prompts, given, use_tqdm=False, lora_request=list(adapters))
    return [[next(iter(row.values())).logprob for row in output.prompt_logprobs[1:]] for output in outputs]


def reference(model: Path) -> torch.Tensor:
    """The same of TorchTitan's forward."""
    return load_reference(model).logprobs(PROMPT)[torch.arange(len(PROMPT) - 1), PROMPT[1:]]


def engine_of(model: Path, parallel: dict[str, int], dtype: Any, model_impl: str = "torchtitan") -> Any:
    from titan_bridge.engine.run.offline import engine

    config = InferConfig(
        model=str(model),
        dtype=dtype,
        parallel=Parallel(**parallel),
        model_impl=model_impl,
        max_model_len=128,
        vllm={
            "enable_lora": True,
            "max_loras": 2,
            "max_lora_rank": 8,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "num_gpu_blocks_override": 16,
        },
    )
    return engine(config)


@pytest.mark.parametrize(("family", "fields", "parallel", "dtype"), CASES, ids=str)
def test_adapters_have_the_numbers_of_merged_checkpoints(
    family: Any,
    fields: dict[str, Any],
    parallel: dict[str, int],
    dtype: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_orphans: None,
) -> None:
    from vllm.lora.request import LoRARequest

    monkeypatch.setenv(cpu.BIND, cpu.bind(Parallel(**parallel).workers, cpu.cores()) or "auto")
    model = make_checkpoint(tmp_path / "model", family, tokenizer=False, **fields)
    adapters = {
        "everywhere": make_adapter(tmp_path / "a", model, seed=1, rank=4, alpha=8, layers=(0, 1)),
        "values": make_adapter(
            tmp_path / "b",
            model,
            seed=2,
            rank=8,
            alpha=4,
            layers=(1,),
            only="kv_b" if "deep" in family else "v_proj",
        ),
        "outputs": make_adapter(tmp_path / "c", model, seed=3, rank=2, alpha=4, layers=(0, 1), only="o_proj"),
    }
    asked = {name: LoRARequest(name, at, str(path)) for at, (name, path) in enumerate(adapters.items(), 1)}
    refused = {
        "model.layers.1.mlp.experts.0.gate_proj": "expected target modules",
        "model.layers.9.self_attn.o_proj": "has matrices for model.layers.9.self_attn.o_proj, which take none",
    }
    with engine_of(model, parallel, dtype) as (llm, workers, _):
        assert workers[0]["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
        first = answers(llm, [None, asked["everywhere"], asked["values"], None, asked["everywhere"]])
        second = answers(llm, [asked["outputs"], None, asked["everywhere"]])  # takes the place of "values"
        assert sorted(llm.llm_engine.list_loras()) == [1, 3]
        assert llm.llm_engine.remove_lora(3)
        for name, reason in refused.items():
            matrices = {f"{PREFIX}{name}.lora_{which}.weight": torch.ones(8, 8) for which in "AB"}
            wrong = write_adapter(tmp_path / name, matrices, rank=8, alpha=8)
            with pytest.raises(Exception, match=reason):
                llm.llm_engine.add_lora(LoRARequest("wrong", 7, str(wrong)))
        assert llm.llm_engine.add_lora(asked["values"])
        third = answers(llm, [asked["values"], asked["everywhere"]])

    oracle = {None: reference(model)}
    oracle |= {name: reference(merged(tmp_path / name, model, path)) for name, path in adapters.items()}
    rows = [
        *zip(first, [None, "everywhere", "values", None, "everywhere"], strict=True),
        *zip(second, ["outputs", None, "everywhere"], strict=True),
        *zip(third, ["values", "everywhere"], strict=True),
    ]
    for found, name in rows:
        off = {
            other: (torch.tensor(found) - expected).abs().max().item() for other, expected in oracle.items()
        }
        nearest = min(far for other, far in off.items() if other != name)
        print(
            f"{family} {parallel} {dtype} {name}: {off[name]:.1e}, and {nearest:.1e} from the nearest other"
        )
        assert off[name] < 0.5 * nearest
        if dtype == "float32":
            assert off[name] <= 2e-5
    if family == "qwen3":
        with engine_of(model, parallel, dtype, "vllm") as (llm, workers, _):
            assert workers[0]["model_class"] == "vllm.model_executor.models.qwen3.Qwen3ForCausalLM"
            # One after the other: vLLM's own head with adapters fails for the prompts of two requests in one step.
            alone = [answers(llm, [asked[name]]) for name in ("everywhere", "values")]
            theirs = torch.tensor([rows for (rows,) in alone])
        off_vllm = (torch.tensor(first[1:3]) - theirs).abs().max().item()
        print(f"max |difference| from vLLM's own model and adapters: {off_vllm:.1e}")
        assert off_vllm <= 1e-5
