"""LoRA adapters that TorchTitan trains, as PEFT has them and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torchtitan.components.lora import LoRAConverter
from torchtitan.distributed import utils
from torchtitan.models.llama3 import Llama3StateDictAdapter, model_registry

from tests import lora_samples
from titan_bridge import cli
from titan_bridge.checkpoint.open import open_checkpoint
from titan_bridge.models.adapters import use_plain_attention
from titan_bridge.models.build import build_on_meta, materialize
from titan_bridge.testing import make_checkpoint

RANK, ALPHA = 4, 10.0
IDS = torch.arange(3, 43)[None]


def model_of(config):
    use_plain_attention(config)
    return materialize(build_on_meta(config, dtype=torch.float32), "cpu").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """TorchTitan's model with adapters on all linear layers, and its checkpoint as a DCP."""
    spec = model_registry("debugmodel", converters=[LoRAConverter.Config(rank=RANK, alpha=ALPHA)])
    model = model_of(spec.model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.empty(parameter.shape).normal_(std=0.1, generator=generator)
        parameter.copy_(noise + 1 if "norm" in name else noise)
    folder = tmp_path_factory.mktemp("lora") / "dcp"
    dcp.save(dict(model.state_dict()), checkpoint_id=folder, no_dist=True)
    return model, folder


def convert(*arguments: object) -> int:
    return cli.main(["reshard", *map(str, arguments)])


def test_an_adapter_computes_the_same_when_it_is_merged_by_pefts_names(
    trained, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(utils, "_spmd_backend", "partial_dtensor")
    model, folder = trained
    peft = tmp_path / "peft"
    options = ["--config", "llama3:debugmodel", "--lora-alpha", ALPHA]
    assert convert(folder, peft, "--to", "peft", *options) == 0
    config = json.loads((peft / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, ALPHA, "LORA")
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} <= set(
        config["target_modules"]
    )

    plain = model_registry("debugmodel").model
    base = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    to_hf = Llama3StateDictAdapter(plain, None)
    held = to_hf.to_hf(base)
    given = load_file(peft / "adapter_model.safetensors")
    for name in [name for name in given if ".lora_A." in name]:
        weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        held[weight] = held[weight] + ALPHA / RANK * given[name.replace("_A.", "_B.")] @ given[name]
    merged = model_of(plain)
    merged.load_state_dict(to_hf.from_hf(held))
    ours, expected = (each(IDS)[0].log_softmax(-1) for each in (model, merged))
    without = model_of(model_registry("debugmodel").model)
    without.load_state_dict(base)
    assert (ours - expected).abs().max() < 1e-4
    assert (ours - without(IDS)[0].log_softmax(-1)).abs().max() > 0.1

    back = tmp_path / "back"
    assert convert(peft, back, "--to", "dcp", "--config", "llama3:debugmodel") == 0
    with open_checkpoint(back) as checkpoint:
        again = {name: checkpoint.read(name) for name in checkpoint.tensors}
    adapters = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    assert again.keys() == adapters.keys()
    assert [name for name in again if not torch.equal(again[name], adapters[name])] == []


def test_what_cannot_be_is_refused_and_leaves_nothing(trained, tmp_path: Path, capsys) -> None:
    _, folder = trained
    peft, out = tmp_path / "peft", tmp_path / "out"
    told = ["--config", "llama3:debugmodel"]

    def said(*arguments: object) -> str:
        assert convert(*arguments) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "--to peft needs --lora-alpha" in said(folder, out, "--to", "peft", *told)
    alpha = ["--lora-alpha", ALPHA]
    assert "fit no linear layer of this model" in said(
        folder, out, "--to", "peft", "--config", "llama3:1B", *alpha
    )
    assert convert(folder, peft, "--to", "peft", *told, *alpha) == 0
    assert "is a LoRA adapter; allowed: --to dcp" in said(peft, out, "--to", "hf", *told)
    assert "has no config.json" in said(peft, out, "--to", "dcp")
    held = load_file(peft / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    save_file(held | {key: held[key] + 1}, peft / "adapter_model.safetensors")
    assert "has one lora_A for all of them" in said(peft, out, "--to", "dcp", *told)
    save_file(
        {name.replace("layers.0", "layers.77"): held[name] for name in held},
        peft / "adapter_model.safetensors",
    )
    assert "not beside a linear layer of this model" in said(peft, out, "--to", "dcp", *told)
    assert list(tmp_path.glob(".*")) == []


def test_options_hold_for_an_adapter_or_are_refused_by_name(trained, tmp_path: Path, capsys) -> None:
    _, folder = trained
    peft, back, told = tmp_path / "peft", tmp_path / "back", ["--config", "llama3:debugmodel"]
    to_peft = [folder, peft, "--to", "peft", *told, "--lora-alpha", ALPHA]
    to_dcp = [peft, back, "--to", "dcp", *told]
    assert convert(*to_peft, "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert convert(*to_peft) == 0
    assert convert(*to_dcp, "--dry-run") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]
    for given in (to_peft, to_dcp):
        for option in (
            ["--verify"],
            ["--dtype", "bfloat16"],
            ["--resume"],
            ["--names", "a.{}"],
            ["--fsync"],
            ["--merge-lora", peft],
            ["--with-optimizer"],
            ["--max-shard-size", "1GB"],
            ["--workers", "2"],
            ["--allow-nan"],
        ):
            capsys.readouterr()
            assert convert(*given, *option) == 2
            assert f"{option[0]} is not for a LoRA adapter" in capsys.readouterr().err
    assert convert(*to_dcp, "--lora-alpha", 3) == 2
    assert "--lora-alpha is for --to peft" in capsys.readouterr().err

    (peft / "kept").write_text("")
    assert convert(*to_peft) == 2
    assert "--overwrite it" in capsys.readouterr().err
    assert convert(*to_peft, "--overwrite") == 0
    assert {path.name for path in peft.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert convert(folder, folder, "--to", "peft", *told, "--lora-alpha", ALPHA, "--overwrite") == 2
    assert "SRC and DST are both" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama3", "gpt_oss"])
def test_an_adapter_is_merged_on_the_way_into_any_format(family, tmp_path: Path, capsys) -> None:
    model = make_checkpoint(tmp_path / "model", family, tokenizer=False)
    adapter = lora_samples.make_adapter(tmp_path / "adapter", model, seed=1, rank=4, alpha=8, layers=(0, 1))
    expected = lora_samples.merged(tmp_path / "expected", model, adapter)
    assert convert(model, tmp_path / "hf", "--to", "hf", "--merge-lora", adapter) == 0
    assert convert(model, tmp_path / "dcp", "--to", "dcp", "--merge-lora", adapter) == 0
    assert convert(tmp_path / "dcp", tmp_path / "back", "--to", "hf", "--config", model) == 0
    given, want = load_file(model / "model.safetensors"), load_file(expected / "model.safetensors")
    for folder in ("hf", "back"):
        (file,) = (tmp_path / folder).glob("*.safetensors")
        found = load_file(file)
        assert found.keys() == want.keys()
        changed = {name for name in want if not torch.equal(want[name], given[name])}
        assert len(changed) == len(list(lora_samples.adaptable(iter(given))))
        for name in want:
            if name in changed:
                torch.testing.assert_close(found[name], want[name], rtol=0, atol=1e-6)
            else:
                assert torch.equal(found[name], want[name])

    for wrong, options, reason in (
        (tmp_path / "dcp", ["--config", model], "is dcp; allowed: hf"),
        (
            make_checkpoint(tmp_path / "other", family, tokenizer=False, hidden_size=64),
            [],
            "fit no weight of",
        ),
    ):
        capsys.readouterr()
        assert convert(wrong, tmp_path / "out", "--to", "hf", "--merge-lora", adapter, *options) == 2
        assert reason in capsys.readouterr().err
    assert convert(model, tmp_path / "out", "--to", "hf", "--merge-lora", model) == 2
    assert "is no LoRA adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_alpha": None}, "lora_alpha=None; it must be a number above 0"),
        ({"lora_alpha": "8"}, "lora_alpha='8'; it must be a number above 0"),
        ({"r": 0}, "r=0; it must be a number above 0"),
        ({"r": True}, "r=True; it must be a number above 0"),
        ({"r": 64}, "lora_A.weight has shape (4, "),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights='pissa_niter_4' trains beside other base",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' trains beside other base"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga' trains beside other base"),
        ({"a": (2, 128)}, "lora_A.weight has shape (2, 128); a matrix of r=4 rows"),
        ({"b": (128, 8)}, "lora_B.weight has shape (128, 8); a matrix of r=4 columns"),
        ({"b": (512,)}, "lora_B.weight has shape (512,); a matrix of r=4 columns"),
    ],
)
def test_an_adapter_whose_scale_or_matrices_are_not_certain_is_refused(
    change, said, tmp_path, capsys
) -> None:
    model = make_checkpoint(tmp_path / "model", "llama3", tokenizer=False)
    adapter = lora_samples.make_adapter(
        tmp_path / "adapter", model, seed=1, rank=4, alpha=8, layers=(0,), only="q_proj"
    )
    config, tensors = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    stated = json.loads(config.read_text()) | {"init_lora_weights": "gaussian"}
    config.write_text(json.dumps(stated))
    arguments = [model, tmp_path / "out", "--to", "hf", "--merge-lora", adapter]
    assert convert(*arguments, "--dry-run") == 0
    held = load_file(tensors)
    for which in change.keys() & {"a", "b"}:
        (name,) = (name for name in held if f".lora_{which.upper()}." in name)
        held[name] = torch.zeros(change[which])
    save_file(held, tensors)
    stated |= {key: value for key, value in change.items() if key not in ("a", "b")}
    config.write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))
    capsys.readouterr()
    assert convert(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
