"""`titan-bridge plan` on layouts that `titan-bridge inspect` wrote, and on a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from titan_bridge.cli import main
from titan_bridge.testing import make_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "moe", "qwen3_moe", tokenizer=False)


def inspect(model: Path, file: Path, capsys: pytest.CaptureFixture[str], *options: str) -> Path:
    assert main(["inspect", str(model), "--json", *options]) == 0
    file.write_text(capsys.readouterr().out)
    return file


def test_from_trainer_to_engine(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = inspect(model, tmp_path / "train.json", capsys, "--dp", "4", "--dense", "shard")
    engine = inspect(model, tmp_path / "serve.json", capsys, "--tp", "2", "--ep", "2")
    picture = tmp_path / "traffic.svg"
    assert main(["plan", str(trainer), str(engine), "--json", "--picture", str(picture)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == facts["lower_bound"] == sum(facts["received"].values()) > 0
    assert "<svg" in picture.read_text()
    assert main(["plan", str(trainer), str(trainer), "--json", "--colocated"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 0


def test_from_a_checkpoint(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = inspect(model, tmp_path / "serve.json", capsys, "--tp", "2", "--ep", "2")
    assert main(["plan", str(model), str(engine), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == facts["lower_bound"]
    assert facts["missing"] == {}


def test_a_directory_is_no_destination(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), str(model)]) == 2
    assert "DST is a layout file" in capsys.readouterr().err
