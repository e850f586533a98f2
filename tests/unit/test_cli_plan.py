"""`titan-bridge plan` on layouts that `titan-bridge inspect` wrote, and on a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from titan_bridge.cli import main
from titan_bridge.sharding.layout import Layout
from titan_bridge.sharding.plan import padding_views, plan
from titan_bridge.testing import make_checkpoint
from titan_bridge.transfer.samples import local_part, sample


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


def test_between_layouts_of_a_vocabulary_that_tp_does_not_divide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """777 rows at tp=1, 778 at tp=2: the rows of the vocabulary travel, those that pad it do not."""
    model = make_checkpoint(tmp_path / "odd", "llama3", tokenizer=False, vocab_size=777)
    files = [inspect(model, tmp_path / f"{tp}.json", capsys, "--tp", str(tp)) for tp in (1, 2)]
    layouts = [Layout.read(file) for file in files]
    assert [layout.params["lm_head.weight"].shape[0] for layout in layouts] == [777, 778]
    for at, to in ((0, 1), (1, 0)):
        assert main(["plan", str(files[at]), str(files[to]), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["bytes"] == facts["lower_bound"] == sum(facts["received"].values())
        assert facts["missing"] == ({"tok_embeddings.weight": 128, "lm_head.weight": 128} if to else {})

        made = plan(layouts[at], layouts[to], padding_views(layouts[at], layouts[to]), allow_missing=True)
        full = {name: sample(name, param.shape, 1) for name, param in layouts[1].params.items()}
        held = {name: tensor[: layouts[at].params[name].shape[0]] for name, tensor in full.items()}
        for rank in layouts[to].ranks:
            shapes = {name: layouts[to].local_shape(name, rank) for name in full}
            live = {name: torch.zeros(shape or ()) for name, shape in shapes.items()}
            for copy in made.copies(destination=rank):
                source = local_part(held[copy.source_name], layouts[at], copy.source_name, int(copy.source))
                window = copy.destination_window.of(live[copy.destination_name])
                window.copy_(copy.source_window.of(source))
            for name, tensor in full.items():
                rows = layouts[to].params[name].shape[0]
                want = tensor[:rows].clone()
                want[777:] = 0
                assert torch.equal(live[name], local_part(want, layouts[to], name, rank)), name

    other = make_checkpoint(tmp_path / "other", "llama3", tokenizer=False, vocab_size=775)
    file = inspect(other, tmp_path / "other.json", capsys)
    assert main(["plan", str(file), str(files[1])]) == 2
    assert "has shape (775, 128) in the source and (778, 128)" in capsys.readouterr().err


def test_a_directory_is_no_destination(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), str(model)]) == 2
    assert "DST is a layout file" in capsys.readouterr().err
