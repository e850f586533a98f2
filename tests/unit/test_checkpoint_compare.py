"""Differences and fingerprints of checkpoints in any two formats, against what was changed and torch's own values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.checkpoint_samples import NORM, SMALL, changed, contents, options
from titan_bridge import cli
from titan_bridge.checkpoint import target
from titan_bridge.checkpoint.compare import fingerprints, open_sides
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.fingerprint import fingerprint
from titan_bridge.testing import make_checkpoint


@pytest.fixture(scope="module", params=["qwen3_moe", "llama3_tied", "gpt_oss"])
def model(request, tmp_path_factory) -> dict[str, Path]:
    """One model in every format, and in bfloat16."""
    base = tmp_path_factory.mktemp("compare")
    family, *tied = request.param.split("_tied")
    small = SMALL | ({"tie_word_embeddings": True} if tied else {})
    found = {"hf": make_checkpoint(base / "hf", family, tokenizer=False, **small)}
    for name, more in {
        "dcp": {"to": "dcp"},
        "many": {"to": "hf", "max_shard_size": 20_000},
        "bf16": {"to": "dcp", "dtype": torch.bfloat16},
    }.items():
        found[name] = base / name
        prepare(options(found["hf"], found[name], **more)).run()
    return found


def run(capsys, *arguments: object) -> tuple[int, dict]:
    code = cli.main([*map(str, arguments), "--json"])
    said = capsys.readouterr()
    assert not said.err
    return code, json.loads(said.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    "pair", [("hf", "dcp"), ("many", "dcp"), ("many", "hf"), ("dcp", "dcp")], ids="-".join
)
def test_formats_of_one_model_are_equal(model, pair, capsys) -> None:
    a, b = (model[name] for name in pair)
    code, found = run(capsys, "diff", a, b)
    assert (code, found["equal"]) == (0, True)
    assert found["compared"] >= 20
    code, found = run(capsys, "fingerprint", a, b)
    assert (code, found["equal"], found["fingerprints"][0]) == (0, True, found["fingerprints"][1])


def test_fingerprints_are_those_of_whole_tensors(model) -> None:
    expected = {
        name: fingerprint(tensor) for name, tensor in load_file(model["hf"] / "model.safetensors").items()
    }
    (side,) = open_sides([str(model["dcp"])], common=True)
    with side.source:
        found = dict(fingerprints(side))
    expected.pop("lm_head.weight", None) if "lm_head.weight" not in found else None
    assert found == expected


def test_tensors_of_many_strips_and_other_dtypes(model, monkeypatch, capsys) -> None:
    monkeypatch.setattr(target, "STRIP_BYTES", 1000)
    (side,) = open_sides([str(model["bf16"])], common=True)
    with side.source:
        found = dict(fingerprints(side))
    whole = load_file(model["hf"] / "model.safetensors")
    assert found == {name: fingerprint(whole[name].to(side.tensors[name].dtype)) for name in found}
    assert {tensor.dtype for tensor in side.tensors.values()} == {torch.bfloat16}
    assert run(capsys, "diff", model["dcp"], model["hf"])[0] == 0
    stated = run(capsys, "diff", model["hf"], model["bf16"])[1]["values"]
    distances = {name: (whole[name].double() - whole[name].bfloat16()).abs() for name in found}
    assert {each["name"]: each["max"] for each in stated} == {
        name: float(each.max()) for name, each in distances.items() if each.any()
    }


def test_other_dtype_is_a_difference_unless_both_are_cast(model, capsys) -> None:
    code, found = run(capsys, "diff", model["hf"], model["bf16"])
    assert code == 1
    assert {"name": "model.embed_tokens.weight", "a": "float32", "b": "bfloat16"} in found["dtype"]
    embedding = load_file(model["hf"] / "model.safetensors")["model.embed_tokens.weight"].double()
    distance = (embedding - embedding.bfloat16()).abs()
    stated = next(each for each in found["values"] if each["name"] == "model.embed_tokens.weight")
    assert stated["max"] == float(distance.max())
    assert stated["mean"] == pytest.approx(float(distance.mean()), rel=1e-12)
    assert stated["different"] == int((distance > 0).sum())
    assert run(capsys, "diff", model["hf"], model["bf16"], "--dtype", "bfloat16")[0] == 0
    assert run(capsys, "fingerprint", model["hf"], model["bf16"])[0] == 1
    assert run(capsys, "fingerprint", model["hf"], model["bf16"], "--dtype", "bfloat16")[0] == 0
    assert run(capsys, "diff", model["hf"], model["bf16"], "--dtype", "float32")[0] == 1


def test_one_changed_element_is_named_with_its_size(model, tmp_path, capsys) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    state = contents(model["hf"])
    before = float(state[name][3, 5])

    def change(state: dict[str, torch.Tensor]) -> None:
        state[name][3, 5] = before + 0.25

    other = changed(model["hf"], tmp_path / "other", change)
    distance = abs(float(torch.tensor(before + 0.25)) - before)
    code, found = run(capsys, "diff", model["dcp"], other)
    assert code == 1
    (stated,) = found["values"]
    count = state[name].numel()
    assert stated == {
        "name": name,
        "elements": count,
        "different": 1,
        "not_finite": 0,
        "max": distance,
        "mean": pytest.approx(distance / count),
    }
    assert run(capsys, "diff", model["dcp"], other, "--atol", "0.3")[0] == 0
    code, found = run(capsys, "fingerprint", model["dcp"], other)
    assert (code, found["different"]) == (1, [name])
    cli.main(["diff", str(model["dcp"]), str(other)])
    assert f"{name}: max 0.25, mean" in capsys.readouterr().out


def files(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def test_models_that_nobody_knows_are_compared_by_their_own_names(tmp_path, capsys) -> None:
    ones = torch.ones(4, 3)
    nan = ones.clone()
    nan[0, 0], nan[1, 1] = torch.nan, torch.inf
    a = files(tmp_path / "a", same=nan, wide=ones, gone=ones, odd=ones, kind=ones, none=torch.zeros(0, 3))
    b = files(
        tmp_path / "b",
        same=nan,
        wide=torch.ones(4, 4),
        new=ones,
        odd=nan,
        kind=ones.half(),
        none=torch.zeros(0, 3),
    )
    code, found = run(capsys, "diff", a, b)
    assert code == 1
    assert (found["only_a"], found["only_b"]) == (["gone"], ["new"])
    assert found["shape"] == [{"name": "wide", "a": [4, 3], "b": [4, 4]}]
    assert found["dtype"] == [{"name": "kind", "a": "float32", "b": "float16"}]
    odd = {"name": "odd", "elements": 12, "different": 2, "not_finite": 2, "max": 0.0, "mean": 0.0}
    assert found["values"] == [odd]
    cli.main(["diff", str(a), str(b)])
    assert "2 NaN or infinite on one side" in capsys.readouterr().out


def test_whole_numbers_are_compared_as_such(tmp_path, capsys) -> None:
    big = torch.tensor([2**62 + 1, 5, 2**53 + 3])
    sides = []
    for name, tensor in {"a": big, "b": big + torch.tensor([1, 0, 0])}.items():
        (tmp_path / name).mkdir()
        save_file({"count": tensor}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        sides.append(tmp_path / name)
    code, found = run(capsys, "diff", *sides)
    assert (code, found["values"][0]["different"], found["values"][0]["max"]) == (1, 1, 1.0)


def test_layout_files(model, tmp_path, capsys) -> None:
    for tp in (1, 2):
        assert cli.main(["inspect", str(model["hf"]), "--tp", str(tp), "--json"]) == 0
        (tmp_path / f"tp{tp}.json").write_text(capsys.readouterr().out)
    code, found = run(capsys, "diff", tmp_path / "tp1.json", tmp_path / "tp2.json")
    moved = {each["name"] for each in found["placements"]}
    assert (code, found["values"]) == (1, [])
    assert any(name.endswith("wo.weight") for name in moved)
    assert run(capsys, "diff", tmp_path / "tp2.json", tmp_path / "tp2.json")[0] == 0


def test_mistakes_are_one_line(model, tmp_path, capsys) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model["dcp"], bare)
    (bare / "config.json").unlink()
    plain = files(tmp_path / "plain", x=torch.ones(2))
    for arguments, said in {
        ("diff", bare, plain): "config.json, which none of them has; give one with --config",
        ("diff", bare, tmp_path / "x.json"): "give two checkpoints or two layout files",
        ("diff", bare, tmp_path / "nothing"): "nothing does not exist",
        ("diff", bare, bare, "--atol", "nan"): "--atol nan; give a number of at least 0",
        ("fingerprint", bare, "--config", plain): "plain has no config.json",
    }.items():
        assert cli.main([*map(str, arguments)]) == 2, arguments
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert run(capsys, "diff", bare, model["hf"], "--config", model["hf"])[0] == 0
    assert NORM in contents(model["hf"])
