"""TorchTitan's load-balancing bias of routers, a float32 buffer that Hugging Face has no name for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from tests.unit.checkpoint_samples import SMALL, contents, of_rank
from titan_bridge.checkpoint import open_checkpoint
from titan_bridge.checkpoint.model_dir import has_expert_bias
from titan_bridge.checkpoint.reshard import Options, Outcome, prepare
from titan_bridge.checks import weights_fit
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes
from titan_bridge.model_layout import layout
from titan_bridge.models import load_hf_config
from titan_bridge.testing import make_checkpoint


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("bias") / "hf", "qwen3_moe", tokenizer=False, **SMALL)


def reshard(source: Path, target: Path, to: str, **options) -> Outcome:
    return prepare(Options(source=source, target=target, to=to, **options)).run()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def test_an_expert_bias_that_is_not_zero_is_reported(hf, tmp_path):
    reshard(hf, tmp_path / "zero", "dcp")
    assert reshard(tmp_path / "zero", tmp_path / "hf", "hf").lost == {}
    state = contents(tmp_path / "zero")
    state["layers.1.moe.expert_bias_E"][2] = 0.5
    dcp.save(state, checkpoint_id=tmp_path / "biased", no_dist=True)
    outcome = reshard(tmp_path / "biased", tmp_path / "hf2", "hf", config=hf)
    assert outcome.lost == {"layers.1.moe.expert_bias_E": 1}
    again = reshard(tmp_path / "biased", tmp_path / "again", "dcp")
    assert again.lost == {}
    assert_same(contents(tmp_path / "again"), state)


def test_a_bias_that_is_damaged_is_said_before_anything_is_written(hf, tmp_path):
    reshard(hf, tmp_path / "dcp", "dcp")
    (tmp_path / "dcp" / "config.json").unlink()
    with open_checkpoint(tmp_path / "dcp") as checkpoint:
        (chunk,) = checkpoint.tensor("layers.1.moe.expert_bias_E").chunks
    with chunk.path.open("r+b") as file:
        file.seek(chunk.offset)
        file.write(bytes(chunk.archive))
    job = prepare(Options(source=tmp_path / "dcp", target=tmp_path / "out", to="hf", config=hf))
    with pytest.raises(BridgeError, match=r"expert_bias_E at \(0,\): "):
        job.run(lambda what, count: pytest.fail("something was written"))
    assert list(tmp_path.glob(".out*")) == []


@pytest.mark.parametrize("sizes", [{"tp": 2, "ep": 2}, {"dp": 2, "tp": 2, "ep": 4, "dense": "shard"}])
def test_an_expert_bias_reaches_every_rank_and_comes_back(hf, tmp_path, sizes):
    """Trained in bfloat16 with a routing bias in float32; every rank holds all of it, and so does a DCP made of it."""
    reshard(hf, tmp_path / "zero", "dcp", dtype=torch.bfloat16)
    state = contents(tmp_path / "zero")
    biases = [name for name in state if name.endswith("expert_bias_E")]
    assert biases
    for number, name in enumerate(biases, start=1):
        state[name][:] = torch.arange(len(state[name])) * 0.01 + number
    dcp.save(state, checkpoint_id=tmp_path / "biased", no_dist=True)
    shutil.copy(hf / "config.json", tmp_path / "biased")
    config = load_hf_config(hf)
    dense = sizes.pop("dense", "replicate")
    served = layout(config, Sizes(**sizes), dense, dtype=torch.bfloat16, expert_bias=True)
    for rank in served.ranks:
        held = of_rank(tmp_path / "biased", served, rank, config)
        for name in biases:
            assert held[name].dtype == torch.float32
            assert torch.equal(held[name], state[name])
    outcome = reshard(tmp_path / "biased", tmp_path / "back", "dcp")
    assert outcome.lost == {}
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    assert_same(contents(tmp_path / "back"), state)
    # Who serves builds routers with the bias, and the preflight expects it.
    for directory in ("zero", "biased", "back"):
        assert has_expert_bias(str(tmp_path / directory))
        weights_fit(str(tmp_path / directory), None, config)
    assert not has_expert_bias(str(hf))


def test_a_bias_that_hugging_face_knows_stays_float32(tmp_path):
    source = make_checkpoint(
        tmp_path / "hf", "deepseek_v3", tokenizer=False, **SMALL | {"num_key_value_heads": 4, "head_dim": 16}
    )
    hf_name, fqn = "model.layers.1.mlp.gate.e_score_correction_bias", "layers.1.moe.expert_bias_E"
    bias = contents(source)[hf_name]
    assert bias.any()
    at = source
    for number, to in enumerate(["hf", "dcp", "dcp", "hf", "dcp", "hf"]):
        reshard(at, tmp_path / str(number), to, dtype=torch.bfloat16)
        at = tmp_path / str(number)
        held = contents(at)
        found = held.pop(hf_name if to == "hf" else fqn)
        assert found.dtype == torch.float32
        assert torch.equal(found, bias)
        assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
        assert to == "hf" or load_hf_config(at)["dtype"] == "bfloat16"
    weights_fit(str(tmp_path / "1"), None, load_hf_config(source))
    state = contents(tmp_path / "1")
    del state[fqn]
    dcp.save(state, checkpoint_id=tmp_path / "without", no_dist=True)
    with pytest.raises(BridgeError, match=f"missing: {fqn}"):
        reshard(tmp_path / "without", tmp_path / "x", "hf", config=source)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    source = make_checkpoint(
        tmp_path / "hf", "deepseek_v3", tokenizer=False, **SMALL | {"num_key_value_heads": 4, "head_dim": 16}
    )
    whole = contents(source)
    further = {
        name.replace("layers.1", "layers.2"): tensor.clone()
        for name, tensor in whole.items()
        if "layers.1." in name
    } | {"model.layers.2.eh_proj.weight": torch.ones(32, 64)}
    save_file(whole | further, source / "model.safetensors")
    config = load_hf_config(source)
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    reshard(source, tmp_path / "dcp", "dcp")
    reshard(tmp_path / "dcp", tmp_path / "back", "hf")
    assert_same(contents(tmp_path / "back"), whole)
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(BridgeError, match=r"unexpected: model\.layers\.2"):
        reshard(source, tmp_path / "x", "dcp")
