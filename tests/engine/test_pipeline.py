"""An engine of two pipeline stages by two tp ranks: its numbers, where its parameters live, and new weights for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.engine.test_parity import check
from tests.unit.test_parallelize_specs import MODELS
from titan_bridge import cli, cpu, parity
from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes
from titan_bridge.models import family_for
from titan_bridge.policy.layers import split
from titan_bridge.policy.schema import NO_POLICY
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

FIELDS = {"num_hidden_layers": 3, "mlp_only_layers": [1], "tie_word_embeddings": True, "vocab_size": 777}
FLAGS = ["--pp", "2", "--tp", "2", "--ep", "2", "--attention-tp", "1"]
LAYERS = ({"0", "1"}, {"2"})
"""Of each stage."""


def test_stages_are_vllms_and_what_it_cannot_deal_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.utils import get_pp_indices

    from titan_bridge.engine.model.stages import staged

    assert staged(Sizes(tp=2), 5) == Sizes(tp=2)
    for pp, layers in ((2, 5), (3, 61), (4, 6), (5, 5)):
        sizes = staged(Sizes(pp=pp), layers)
        for stage in range(pp):
            assert get_pp_indices(layers, stage, pp) == (
                sizes.layers_of(stage).start,
                sizes.layers_of(stage).stop,
            )
    with pytest.raises(BridgeError, match="pp=6 is more than the 5 layers of the model; allowed: 1 to 5"):
        staged(Sizes(pp=6), 5)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "4,1")
    assert staged(Sizes(pp=2), 5).stages == (4, 1)
    for given in ("4,2", "5,0", "2,2,1", "a,b"):
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", given)
        with pytest.raises(BridgeError, match=r"VLLM_PP_LAYER_PARTITION|give at least 1 to each of pp=2"):
            staged(Sizes(pp=2), 5)


def test_the_name_of_a_compiled_step_says_its_stage() -> None:
    from titan_bridge.engine.model.build import Setup
    from titan_bridge.engine.model.compiled import _digest
    from titan_bridge.engine.options import TitanOptions

    hf = MODELS["llama3"]
    family = family_for(hf)

    def digest(stage: int, *stages: int) -> str:
        sizes = Sizes(pp=len(stages), stages=stages, dp_outside=True)
        config, options = family.model_config(hf), TitanOptions()
        decided = split(NO_POLICY, family, config, sizes)
        return _digest(
            Setup(hf=hf, family=family, config=config, sizes=decided.sizes, options=options, padded_vocab=768,
                  max_model_len=64, split=decided),
            stage,
        )  # fmt: skip

    assert digest(0, 1, 1) == digest(0, 1, 1)
    assert len({digest(0, 1, 1), digest(1, 1, 1), digest(0, 1, 2), digest(1, 2, 1)}) == 4


def test_workers_that_contradict_each_other_are_named() -> None:
    from titan_bridge.engine.specs import joined
    from titan_bridge.model_layout import layout

    whole = layout(MODELS["qwen3-tied"], Sizes(pp=2, tp=2, stages=(1, 1), dp_outside=True)).to_json()

    def told(stage: int) -> dict[str, Any]:
        params = {
            fqn: param
            for fqn, param in whole["params"].items()
            if str(stage) in param["mesh"].split("_pp")[1]
        }
        meshes = {param["mesh"]: whole["meshes"][param["mesh"]] for param in params.values()}
        return {**whole, "params": params, "meshes": meshes}

    answers = [told(0), told(0), told(1), told(1)]
    assert joined(answers) == whole
    assert set(told(0)["params"]) & set(told(1)["params"]) == {"tok_embeddings.weight"}
    answers[3] = json.loads(json.dumps(answers[3]))
    answers[3]["params"]["tok_embeddings.weight"]["placements"] = ["R", "R", "R", "S(1)"]
    with pytest.raises(
        BridgeError, match=r"workers 0 and 3 hold different layouts: tok_embeddings\.weight is "
    ):
        joined(answers)


@dataclasses.dataclass
class Running:
    """The engine, started from checkpoint a; `b` lies beside it."""

    llm: Any
    folder: Path
    workers: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    """Of the fixed prompts, by checkpoint a."""

    def answers(self) -> list[float]:
        """Log-probabilities of the tokens of a prompt."""
        from vllm import SamplingParams

        given = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        (output,) = self.llm.generate([{"prompt_token_ids": list(range(7, 47))}], given, use_tqdm=False)
        return [next(iter(row.values())).logprob for row in output.prompt_logprobs[1:]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Dense and sparse layers, a tied head, a vocabulary that tp does not divide, attention over one rank."""
    from titan_bridge.engine.run.offline import complete, engine

    folder = tmp_path_factory.mktemp("running")
    for seed, name in enumerate("ab"):
        make_checkpoint(folder / name, "qwen3_moe", seed=seed, **FIELDS)

    def started(parallel: Parallel) -> Any:
        options = {"enforce_eager": True, "weight_transfer_config": {"backend": "titan"}}
        return engine(
            InferConfig(
                model=str(folder / "a"),
                dtype="float32",
                parallel=parallel,
                max_model_len=parity.LONGEST,
                vllm={**parity.ENGINE_OPTIONS, **options},
            )
        )

    with cpu.variables({}), started(Parallel(pp=2, tp=2, ep=2, attn_tp=1)) as (llm, workers, _):
        completions, _ = complete(llm, *parity.rounds(parity.prompts(777)))
        answers = [dataclasses.asdict(completion) for completion in completions]
        yield Running(llm=llm, folder=folder, workers=workers, completions=answers)


def test_the_numbers_of_both_references_and_each_stage_its_own_part(running: Running) -> None:
    facts = {
        "model_class": running.workers[0]["model_class"],
        "dtype": running.workers[0]["dtype"],
        "cached_tokens": sum(answer["cached_tokens"] for answer in running.completions),
        "sizes": running.workers[0]["sizes"],
        "references": [
            dataclasses.asdict(parity.compare(running.completions, *each))
            for each in parity.references(running.folder / "a")
        ],
    }
    check(facts, {"pp": 2, "tp": 2, "ep": 2})
    assert [worker["stage"] for worker in running.workers] == [0, 0, 1, 1]
    loaded = [worker["loaded"] for worker in running.workers]
    for each in loaded:
        assert each["bytes_read"] == each["bytes_planned"] < each["bytes_total"] // 2
    assert [worker["attention"] for worker in running.workers] == [
        f"attention with a cache of {layers * 1024:,} bytes a token" for layers in (2, 2, 1, 1)
    ]


def test_inspect_says_what_the_engine_holds(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    from titan_bridge.engine import specs

    assert cli.main(["inspect", str(running.folder / "a"), *FLAGS, "--json"]) == 0
    told = specs.layout(running.llm)
    assert json.loads(capsys.readouterr().out) == told.to_json()
    assert told.param("tok_embeddings.weight").spec.mesh == "dense_pp0_1"
    assert told.meshes["sparse_pp1"].ranks == (2, 3)
    for stage, own in enumerate(LAYERS):
        params = told.params.items()
        on = {fqn.split(".")[1] for fqn, param in params if param.spec.mesh.endswith(f"_pp{stage}")}
        assert on - {"weight"} == own
    verified = specs.verify(running.llm, str(running.folder / "a"))
    assert [found for worker in verified for found in worker if not found["equal"]] == []
    assert {found["name"] for worker in verified for found in worker} == told.params.keys()


def test_fingerprints_are_those_of_the_checkpoint(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    from titan_bridge.engine import specs

    assert cli.main(["fingerprint", str(running.folder / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == specs.fingerprints(running.llm)


def test_updates_of_all_weights_and_of_a_few_reach_every_stage(running: Running) -> None:
    from titan_bridge.engine.transfer import LLMClient
    from titan_bridge.transfer.options import Options
    from titan_bridge.transfer.trainer import Trainer

    fresh = running.answers()
    held = load_file(running.folder / "b" / "model.safetensors")
    with Trainer(lambda: held, LLMClient(running.llm), options=Options(seconds=60)) as trainer:
        report = trainer.send("b")
        assert report.kind == "whole"
        assert sum(report.received.values()) == report.lower_bound
        other = running.answers()
        held = load_file(running.folder / "a" / "model.safetensors")
        trainer.send("a")
        assert running.answers() == fresh != other
        for at in (0, 2):  # a layer of each stage, and what both have
            held[f"model.layers.{at}.self_attn.o_proj.weight"][::7] *= 1.5
        held["model.embed_tokens.weight"][40] *= 2
        report = trainer.send("changed")
        assert report.kind == "delta"
        assert all(0 < nbytes < report.lower_bound // 20 for nbytes in report.received.values())
        trainer.verify()
        assert running.answers() not in (fresh, other)
        held = load_file(running.folder / "a" / "model.safetensors")
        trainer.send("a again")
    assert running.answers() == fresh


def test_other_weights_are_read_while_it_runs(running: Running) -> None:
    fresh = running.answers()
    for name, same in (("b", False), ("a", True)):
        path = str(running.folder / name)
        running.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        running.llm.reset_prefix_cache()
        assert (running.answers() == fresh) == same
        reports = running.llm.collective_rpc("bridge_report")
        loaded = [report["loaded"] for report in reports]
        assert all(each["bytes_read"] == each["bytes_planned"] < each["bytes_total"] // 2 for each in loaded)
