"""What is refused before an engine starts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from titan_bridge.checks import experts_in, model_directory, port_free, weights_present
from titan_bridge.errors import BridgeError


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    save_file({"a": torch.zeros(4, 4)}, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
    save_file({"b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_a_whole_model_passes(model):
    assert model_directory(str(model)) == {"architectures": ["Qwen3ForCausalLM"]}
    weights_present(str(model))
    (model / "model.safetensors.index.json").unlink()
    weights_present(str(model))


def refusal(check, *arguments) -> str:
    with pytest.raises(BridgeError) as caught:
        check(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_directory(tmp_path, model):
    assert "does not exist" in refusal(model_directory, str(tmp_path / "none"))
    assert "is not a directory" in refusal(model_directory, str(model / "config.json"))
    (model / "config.json").write_text('{"a": 1,\n oops}')
    assert "config.json:2:2: not JSON" in refusal(model_directory, str(model))
    (model / "config.json").write_text("[]")
    assert "holds a JSON list" in refusal(model_directory, str(model))
    (model / "config.json").unlink()
    assert "has no config.json (found: model-1.safetensors" in refusal(model_directory, str(model))


def test_index_that_names_missing_files(model):
    (model / "model-1.safetensors").unlink()
    (model / "model-2.safetensors").unlink()
    message = refusal(weights_present, str(model))
    assert message.endswith("names files that are missing: model-1.safetensors, model-2.safetensors")
    (model / "model.safetensors.index.json").write_text("{}")
    assert "is no safetensors index" in refusal(weights_present, str(model))


@pytest.mark.parametrize("cut", [1, 40, 10**9])
def test_truncated_weights_are_all_named(model, cut):
    for name in ("model-1.safetensors", "model-2.safetensors"):
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[: max(0, len(content) - cut)])
    message = refusal(weights_present, str(model))
    assert "model-1.safetensors (" in message
    assert "model-2.safetensors (" in message


def test_weights_that_are_no_safetensors(model):
    (model / "model-1.safetensors").write_bytes((5).to_bytes(8, "little") + b"hello")
    assert "model-1.safetensors (its header is not JSON)" in refusal(weights_present, str(model))


def test_port(busy_port):
    assert "Address already in use" in refusal(port_free, "127.0.0.1", busy_port)
    assert "out of range; allowed: 1 to 65535" in refusal(port_free, "127.0.0.1", 70000)
    assert "cannot be used" in refusal(port_free, "203.0.113.1", 8000)


def test_experts():
    assert experts_in({"num_experts": 8})
    assert experts_in({"n_routed_experts": 2})
    assert not experts_in({"num_experts": 0})
    assert not experts_in({"hidden_size": 8})
