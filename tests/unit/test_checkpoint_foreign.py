"""Checkpoints as other programs write them: read where that can be done right, else refused with what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from tests.unit.checkpoint_samples import SMALL, contents, options
from titan_bridge import cli
from titan_bridge.checkpoint import Checkpoint, open_checkpoint
from titan_bridge.checkpoint.model_dir import open_named_either_way
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.errors import BridgeError
from titan_bridge.models import family_for, load_hf_config
from titan_bridge.ports import free_port
from titan_bridge.reference import load_reference
from titan_bridge.testing import make_checkpoint

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, Path]:
    """A model in Hugging Face's format, and as DCP under TorchTitan's names."""
    base = tmp_path_factory.mktemp("foreign")
    found = {"hf": make_checkpoint(base / "hf", "qwen3_moe", tokenizer=False, **SMALL | {"head_dim": 32})}
    found["dcp"] = base / "dcp"
    prepare(options(found["hf"], found["dcp"], to="dcp")).run()
    return found


def same(folder: Path, model: dict[str, Path]) -> None:
    """A Hugging Face folder has every bit of the model."""
    expected, found = contents(model["hf"]), contents(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def refused(capsys, *arguments: object) -> str:
    """The one line that a command says."""
    assert cli.main([*map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("names", ["hf", "dcp"])
@pytest.mark.parametrize("pattern", ["model.{}", "state.net.{}", "module.{}._orig"])
def test_names_of_other_programs_are_mapped(model, names, pattern, tmp_path: Path) -> None:
    """Flat or nested state dicts, with optimizer state and counters beside them."""
    values = {pattern.replace("{}", name): tensor for name, tensor in contents(model[names]).items()}
    if pattern == "state.net.{}":
        nested = {name.removeprefix("state.net."): tensor for name, tensor in values.items()}
        values = {"state": {"net": nested}}
    values |= {"optim": {"exp_avg": torch.ones(3)}, "step": 7}
    dcp.save(values, checkpoint_id=str(tmp_path / "other"))
    job = prepare(options(tmp_path / "other", tmp_path / "new", to="hf", names=pattern, config=model["hf"]))
    job.run()
    same(tmp_path / "new", model)
    assert job.source.left_out == 2  # the moment and the counter


def test_a_pattern_is_for_every_command_that_reads_weights(model, tmp_path: Path, capsys) -> None:
    values = {f"net.{name}": tensor for name, tensor in contents(model["dcp"]).items()}
    dcp.save(values | {"step": 7}, checkpoint_id=str(other := tmp_path / "other"))
    shutil.copy(model["hf"] / "config.json", other)
    for command in ("diff", "fingerprint"):
        assert cli.main([command, str(other), str(model["hf"]), "--names", "net.{}"]) == 0
        assert cli.main([command, str(model["hf"]), str(other), "--names-b", "net.{}"]) == 0
        assert "equal" in capsys.readouterr().out
        assert "fits no tensor" in refused(capsys, command, other, model["hf"], "--names-b", "net.{}")
    serve = ("serve", other, "--dry-run", "--skip-tokenizer-init", "--port", free_port())
    assert "missing: tok_embeddings.weight" in refused(capsys, *serve)
    assert cli.main([*map(str, serve), "--names", "net.{}"]) == 0
    assert '"names": "net.{}"' in capsys.readouterr().out
    given, expected = load_reference(other, names="net.{}"), load_reference(model["hf"])
    assert torch.equal(given.logprobs([1, 2, 3]), expected.logprobs([1, 2, 3]))


def test_other_weights_have_the_names_of_the_pattern_or_ours(model, tmp_path: Path) -> None:
    """What an engine that serves names of another program does with the next folder."""
    hf = load_hf_config(model["hf"])
    ours = contents(model["dcp"])
    both = {f"net.{name}": tensor + 1 for name, tensor in ours.items()} | ours
    dcp.save(both, checkpoint_id=str(tmp_path / "both"))
    torn = dict(list(contents(model["hf"]).items())[1:])
    (tmp_path / "torn").mkdir()
    save_file(torn, tmp_path / "torn" / "model.safetensors")

    def opened(folder: Path, names: str | None = "net.{}") -> Checkpoint:
        return open_named_either_way(folder, names, family_for(hf), hf)

    for folder in (model["hf"], model["dcp"]):
        for names in ("net.{}", "model.{}", None):
            with opened(folder, names) as found, open_checkpoint(folder) as plain:
                assert found.tensors == plain.tensors
    with opened(tmp_path / "both") as found:
        assert torch.equal(found.read("norm.weight"), ours["norm.weight"] + 1)
    with pytest.raises(BridgeError, match=rf"--names 'net.{{}}' fits no tensor of {tmp_path / 'torn'}"):
        opened(tmp_path / "torn")


def test_a_dcp_under_names_of_hugging_face_is_one(model, tmp_path: Path, capsys) -> None:
    """What a trainer of transformers' own models writes, with config.json beside it: read, compared, converted."""
    dcp.save(contents(model["hf"]), checkpoint_id=str(tmp_path / "other"))
    shutil.copy(model["hf"] / "config.json", tmp_path / "other")
    assert cli.main(["diff", str(tmp_path / "other"), str(model["dcp"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compared"] > 20
    prepare(options(tmp_path / "other", tmp_path / "new", to="dcp")).run()
    expected, found = contents(model["dcp"]), contents(tmp_path / "new")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_patterns_that_do_not_fit_are_refused(model, tmp_path: Path, capsys) -> None:
    run = ("reshard", model["dcp"], tmp_path / "new", "--to", "hf", "--names")
    assert "'model'" in refused(capsys, *run, "model")
    assert "fits no tensor" in (said := refused(capsys, *run, "net.{}"))
    assert "tok_embeddings.weight" in said
    assert "--with-optimizer" in refused(capsys, *run, "net.{}", "--with-optimizer")
    assert not (tmp_path / "new").exists()


def test_two_patterns_are_two_runs(model, tmp_path: Path) -> None:
    """Average and live weights have the same names, shapes and files: --resume does not take one for the other."""
    weights = contents(model["dcp"])
    values = {f"{kind}.{name}": tensor for kind in ("ema", "model") for name, tensor in weights.items()}
    dcp.save(values, checkpoint_id=str(tmp_path / "other"))
    digests = {
        prepare(
            options(tmp_path / "other", tmp_path / "new", to="hf", names=names, config=model["hf"])
        ).digest()
        for names in ("ema.{}", "model.{}")
    }
    assert len(digests) == 2


def split(model: dict[str, Path], folder: Path) -> list[Path]:
    """The weights in three numbered files, without an index."""
    folder.mkdir()
    shutil.copy(model["hf"] / "config.json", folder)
    tensors = load_file(model["hf"] / "model.safetensors")
    files = [folder / f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in list(tensors)[number::3]}, file)
    return files


def test_files_without_an_index_are_read(model, tmp_path: Path) -> None:
    files = split(model, tmp_path / "split")
    same(tmp_path / "split", model)
    files[1].unlink()
    with pytest.raises(BridgeError, match=r"lacks part 2 of 3"):
        open_checkpoint(tmp_path / "split")


def test_mixed_dtypes_stay_as_they_are(model, tmp_path: Path, capsys) -> None:
    """q in bfloat16 beside k in float32: from file to file and back, each keeps its own."""
    source = tmp_path / "mixed"
    source.mkdir()
    shutil.copy(model["hf"] / "config.json", source)
    tensors = load_file(model["hf"] / "model.safetensors")
    tensors |= {name: t.bfloat16() for name, t in tensors.items() if "q_proj" in name}
    save_file(tensors, source / "model.safetensors")
    prepare(options(source, tmp_path / "dcp", to="dcp")).run()
    prepare(options(tmp_path / "dcp", tmp_path / "back", to="hf")).run()
    assert cli.main(["diff", str(source), str(tmp_path / "back")]) == 0
    assert {t.dtype for t in contents(tmp_path / "back").values()} == {torch.bfloat16, torch.float32}
    capsys.readouterr()


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("s3://bucket/run/step-10", "aws s3 cp --recursive s3://bucket/run/step-10 DIR"),
        ("gs://bucket/run", "gcloud storage cp --recursive gs://bucket/run DIR"),
        ("hf://org/name", "hf download"),
        ("sftp://host/run", "copy the folder"),
    ],
)
def test_remote_checkpoints_are_refused_with_what_to_do(model, address, hint, tmp_path, capsys) -> None:
    for arguments in (
        ("reshard", address, tmp_path / "new", "--to", "hf"),
        ("reshard", model["hf"], address, "--to", "dcp"),
        ("diff", address, model["hf"]),
        ("fingerprint", address),
        ("serve", address),
    ):
        said = refused(capsys, *arguments)
        assert f"{address} is remote" in said
        assert hint in said


def test_pickles_are_refused_with_what_to_do(tmp_path: Path, capsys) -> None:
    (tmp_path / "bin").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "bin" / "pytorch_model.bin")
    said = refused(capsys, "reshard", tmp_path / "bin", tmp_path / "new", "--to", "hf")
    assert "pytorch_model.bin" in said
    assert "save_pretrained" in said
