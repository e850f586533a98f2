"""Engines whose layers are cut over different numbers of ranks: the numbers, the layout, and updates of the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.engine.test_parity import EXPANDED, SERVABLE, answer_here, check
from tests.unit.test_parallelize_specs import MODELS
from titan_bridge import cli, cpu, parity
from titan_bridge.mesh import Sizes
from titan_bridge.models import family_for
from titan_bridge.policy.layers import split
from titan_bridge.policy.read import policy_from
from titan_bridge.policy.schema import NO_POLICY, Policy, attention_width
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

WIDTHS = policy_from(
    {
        "rules": [
            {"match": {"prefix_pattern": "layers.0.*"}, "plan": {"tp_size": 1}},
            {"match": {"prefix_pattern": "layers.1.attention"}, "plan": {"tp_size": 1}},
            {"match": {"kind": "attention"}, "plan": {"tp_size": 2}},
            {"match": {"kind": "lm_head"}, "plan": {"tp_size": 1}},
        ]
    },
    "WIDTHS",
)
"""Layer 0 replicated, attention over 1 and over 2 ranks, the head replicated."""
MIXED = {"num_hidden_layers": 3, "mlp_only_layers": [1]}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, int], dict[str, Any]]] = {
    "widths": ("llama3", {**SERVABLE, "num_hidden_layers": 3}, {"tp": 4}, {"policy": WIDTHS, "enforce_eager": False}),
    "latents": ("deepseek_v3", EXPANDED, {"tp": 2, "attn_tp": 1}, {"enforce_eager": False}),
    "too few heads": ("qwen3", {"num_key_value_heads": 2}, {"tp": 4}, {}),
}  # fmt: skip
"""Family, fields of its config, degrees, and how it is started."""


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_both_references(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_orphans: None
) -> None:
    family, fields, parallel, options = CASES[case]
    model = make_checkpoint(tmp_path / "model", family, **fields)
    check(answer_here(model, parallel, monkeypatch, **options), parallel)


def test_a_compiled_step_has_the_same_name_unless_a_layer_is_narrower() -> None:
    from titan_bridge.engine.model.build import Setup
    from titan_bridge.engine.model.compiled import _digest
    from titan_bridge.engine.options import TitanOptions

    hf = MODELS["deepseek"]
    family = family_for(hf)

    def digest(policy: Policy) -> str:
        config = family.model_config(hf)
        decided = split(policy, family, config, Sizes(tp=2))
        options = TitanOptions(parallelism=policy)
        return _digest(
            Setup(hf=hf, family=family, config=config, sizes=decided.sizes, options=options, padded_vocab=768,
                  max_model_len=64, split=decided)
        )  # fmt: skip

    assert digest(NO_POLICY) == digest(attention_width(2)) != digest(attention_width(1))


@dataclasses.dataclass
class Running:
    """An engine with attention over 2 of 4 ranks, started from checkpoint a; `b` lies beside it."""

    llm: Any
    folder: Path
    facts: dict[str, Any]
    """Its numbers against the references, as `titan-bridge parity` says them."""

    def answers(self) -> list[float]:
        """Log-probabilities of the tokens of a prompt."""
        from vllm import SamplingParams

        given = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        (output,) = self.llm.generate([{"prompt_token_ids": list(range(7, 47))}], given, use_tqdm=False)
        return [next(iter(row.values())).logprob for row in output.prompt_logprobs[1:]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Dense and sparse layers, experts over 4 ranks, attention over 2 of them."""
    from titan_bridge.config.schema import InferConfig, Parallel
    from titan_bridge.engine.run.offline import complete, engine

    folder = tmp_path_factory.mktemp("running")
    for seed, name in enumerate("ab"):
        make_checkpoint(folder / name, "qwen3_moe", seed=seed, **MIXED)
    config = InferConfig(
        model=str(folder / "a"),
        dtype="float32",
        parallel=Parallel(tp=4, ep=4, attn_tp=2),
        max_model_len=parity.LONGEST,
        vllm={**parity.ENGINE_OPTIONS, "enforce_eager": True, "weight_transfer_config": {"backend": "titan"}},
    )
    with cpu.variables({}), engine(config) as (llm, workers, _):
        completions, _ = complete(llm, *parity.rounds(parity.prompts(768)))
        answers = [dataclasses.asdict(completion) for completion in completions]
        facts = {
            "model_class": workers[0]["model_class"],
            "dtype": workers[0]["dtype"],
            "cached_tokens": sum(answer["cached_tokens"] for answer in answers),
            "sizes": workers[0]["sizes"],
            "references": [
                dataclasses.asdict(parity.compare(answers, *each))
                for each in parity.references(str(folder / "a"))
            ],
        }
        yield Running(llm=llm, folder=folder, facts=facts)


def test_dense_and_sparse_layers_with_narrow_attention(running: Running) -> None:
    check(running.facts, {"tp": 4, "ep": 4})


def test_inspect_says_what_the_engine_holds(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    from titan_bridge.engine import specs

    flags = ["--tp", "4", "--ep", "4", "--attention-tp", "2"]
    assert cli.main(["inspect", str(running.folder / "a"), *flags, "--json"]) == 0
    told = specs.layout(running.llm)
    assert json.loads(capsys.readouterr().out) == told.to_json()
    assert told.parallelism is not None
    wqkv = "layers.0.attention.qkv_linear.wqkv.weight"
    assert told.param(wqkv).spec.mesh == "dense_tp2"
    assert told.pieces(wqkv, 1) == told.pieces(wqkv, 3) != told.pieces(wqkv, 0)
    verified = specs.verify(running.llm, str(running.folder / "a"))
    assert [found for worker in verified for found in worker if not found["equal"]] == []


def test_updates_of_all_weights_and_of_a_few_reach_every_width(running: Running) -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from titan_bridge.engine.transfer import LLMClient, TitanTrainerInitInfo, TitanWeightSource

    fresh = running.answers()
    held = load_file(running.folder / "b" / "model.safetensors")
    trainer = WeightTransferTrainerFactory.trainer_init(
        TitanTrainerInitInfo(rank=0, timeout_seconds=60),
        client=LLMClient(running.llm),
        source=TitanWeightSource(lambda: held),
    )
    trainer.send_weights()
    assert trainer.report.kind == "whole"
    assert sum(trainer.report.received.values()) == trainer.report.lower_bound
    assert running.answers() != fresh
    held = load_file(running.folder / "a" / "model.safetensors")
    trainer.send_weights()
    assert running.answers() == fresh
    wo = "model.layers.0.self_attn.o_proj.weight"
    held[wo] = held[wo].clone()
    held[wo].view(-1)[::23] *= 1.5
    trainer.send_weights()
    assert trainer.report.kind == "delta"
    assert sum(trainer.report.received.values()) < trainer.report.lower_bound // 20
    assert running.answers() != fresh
    held = load_file(running.folder / "a" / "model.safetensors")
    trainer.send_weights()
    trainer.shutdown()
    assert running.answers() == fresh
