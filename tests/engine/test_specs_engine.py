"""Three ways to ask where the parameters are, one answer: Python, HTTP, and config.json without an engine."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from titan_bridge import cli
from titan_bridge.config.reader import from_dict
from titan_bridge.config.schema import InferConfig
from titan_bridge.engine import specs
from titan_bridge.engine.run.offline import engine
from titan_bridge.errors import BridgeError
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe", vocab_size=777))


def config_of(model: str, model_impl: str, ep: int, **additional: object) -> InferConfig:
    return from_dict(
        InferConfig,
        {
            "model": model,
            "model_impl": model_impl,
            "dtype": "float32",
            "max_model_len": 64,
            "parallel": {"tp": 2, "ep": ep} | ({"attn_tp": 1} if model_impl == "torchtitan" else {}),
            "vllm": {"enforce_eager": True, "max_num_seqs": 2, "additional_config": {"titan": additional}},
        },
    )


@pytest.fixture(scope="module")
def from_python(model):
    """The layout that `specs.layout` gives, and what the check against the checkpoint found."""
    with engine(config_of(model, "torchtitan", 2)) as (llm, workers, _):
        assert workers[0]["model_class"].endswith("TitanForCausalLM")
        return specs.layout(llm).to_json(), specs.verify(llm, model)


@pytest.fixture(scope="module")
def url(model, tmp_path_factory, serve) -> Iterator[str]:
    """A real server with the route."""
    options = (
        "--tp", "2", "--ep", "2", "--attention-tp", "1", "--dtype", "float32", "--max-model-len", "64",
        "--enforce-eager", "--max-num-seqs", "2", "--sharding-spec",
    )  # fmt: skip
    with serve(model, tmp_path_factory.mktemp("server") / "log", *options) as url:
        yield url


def test_the_three_answers_are_equal(model, from_python, url, capsys):
    sizes = ("--tp", "2", "--ep", "2", "--attention-tp", "1")
    code = cli.main(["inspect", model, *sizes, "--dtype", "float32", "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    from_config = json.loads(printed.out)
    answer = httpx.get(f"{url}/v1/sharding_spec")
    assert answer.status_code == 200
    assert answer.json() == from_python[0] == from_config
    assert answer.json()["parallelism"]["axes"] == {"attn_tp": 1}
    assert "/v1/sharding_spec" in httpx.get(f"{url}/openapi.json").json()["paths"]


def test_fingerprints_of_the_engine_are_those_of_the_checkpoint(model, url, tmp_path, capsys):
    assert cli.main(["fingerprint", url, model]) == 0, capsys.readouterr()
    assert cli.main(["fingerprint", url, model, "--dtype", "bfloat16"]) == 0, capsys.readouterr()
    other = make_checkpoint(tmp_path / "other", "qwen3_moe", seed=1, vocab_size=777)
    assert cli.main(["fingerprint", url, str(other), "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["only_a"] == found["only_b"] == []
    assert any("experts.3.down_proj" in name for name in found["different"])
    refused = httpx.get(f"{url}/v1/fingerprints", params={"dtype": "float7"})
    assert refused.status_code == 400
    assert "dtype 'float7' is not a torch dtype" in refused.text
    assert cli.main(["fingerprint", f"{url}/nothing"]) == 2
    assert "serve with --sharding-spec" in capsys.readouterr().err


def test_every_parameter_gathered_by_its_spec_is_the_checkpoints(from_python):
    layout, verified = from_python
    assert len(verified) == 2
    for worker in verified:
        assert [found["name"] for found in worker] == list(layout["params"])
        assert [found for found in worker if not found["equal"]] == []
        assert sum(found["spec"] is not None for found in worker) == 8


def test_vllms_own_model_in_a_running_engine(model):
    """Post-processed and ready to serve, its parameters are still what the specs say."""
    with engine(config_of(model, "vllm", 1, attach_specs=True)) as (llm, workers, _):
        assert workers[0]["model_class"] == "vllm.model_executor.models.qwen3_moe.Qwen3MoeForCausalLM"
        verified, layout, native = specs.verify(llm, model), specs.layout(llm), specs.native(llm)
        with pytest.raises(BridgeError, match=r"^Qwen3MoeForCausalLM has no fingerprints; serve with [^;]*$"):
            specs.fingerprints(llm)
    assert [found for worker in verified for found in worker if not found["equal"]] == []
    assert len(verified) == 2
    w2 = "model.layers.1.mlp.experts.routed_experts.w2_weight"
    assert layout.local_shape(w2, 1) == (8, 128, 32)
    assert native[1]["model.layers.0.self_attn.qkv_proj.weight"]["live_shape"] == [256, 128]
