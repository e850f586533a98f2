"""`titan-bridge plan` on layouts that `titan-bridge inspect` wrote, and on a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from titan_bridge.cli import main
from titan_bridge.commands.train import job_of
from titan_bridge.models.build import build_on_meta, materialize
from titan_bridge.sharding.layout import Layout
from titan_bridge.sharding.plan import padding_views, plan
from titan_bridge.testing import make_checkpoint
from titan_bridge.testing_samples import local_part, sample
from titan_bridge.train import launch


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


def test_sizes_stand_for_the_layout_of_an_engine(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = inspect(model, tmp_path / "train.json", capsys, "--dp", "4", "--dense", "shard")
    engine = inspect(model, tmp_path / "serve.json", capsys, "--tp", "2", "--ep", "2")

    def plan(*arguments: str) -> str:
        assert main(["plan", *arguments, "--json"]) == 0
        return capsys.readouterr().out

    expected = plan(str(trainer), str(engine))
    assert plan("dp=4,dense=shard", "tp=2,ep=2", "--model", str(model)) == expected
    assert plan(str(trainer), "tp=2,ep=2", "--model", str(model)) == expected
    assert plan(str(model), "tp=2,ep=2") == plan(str(model), str(engine))
    assert main(["inspect", str(model), "--tp", "2", "--pp", "2", "--json"]) == 0
    engine.write_text(capsys.readouterr().out)
    told = plan(str(trainer), "tp=2,pp=2", "--model", str(model))
    assert told == plan(str(trainer), str(engine))
    assert len(json.loads(told)["received"]) == 4

    # With a policy, in short and as a file.
    rules = {"parallelism_rules": {"rules": [{"match": {"kind": "attention"}, "plan": {"tp_size": 2}}]}}
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    narrow = inspect(model, tmp_path / "narrow.json", capsys, "--tp", "4", "--attention-tp", "2")
    expected = plan(str(model), str(narrow))
    assert expected != plan(str(model), "tp=4")
    for sizes in ("tp=4,attn_tp=2", f"tp=4,policy={tmp_path / 'rules.json'}"):
        assert plan(str(model), sizes) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{model}/config.json", "tp=2,ep=2"],
            "tp=2,ep=2 are sizes of which model? give its folder with --model",
        ),
        (["{model}", "tp=2,cp=2"], "'tp=2,cp=2' are no sizes; write for instance tp=2,ep=2"),
        (["{model}", "pp=3"], "pp=3 is more than the 2 layers of the model; allowed: 1 to 2"),
        (["{model}", "tp=two"], "'tp=two' are no sizes"),
        (["{model}", "tp=2,tp=4"], "'tp=2,tp=4' are no sizes"),
        (["{model}", "tp=2,attn_tp=x"], "'tp=2,attn_tp=x' are no sizes"),
        (["{model}", "tp=2,dense=half"], "'tp=2,dense=half' are no sizes"),
        (["{model}", "tp=2,attn_tp=3"], "tp_size=3 does not divide tp=2; allowed: 1, 2"),
        (["{model}", "tp=2,policy=none.yaml"], "none.yaml cannot be read: No such file or directory"),
        (["{model}", "{model}"], "is a directory; give a layout file"),
    ],
)
def test_a_side_that_means_nothing_is_refused(
    arguments: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *(argument.format(model=model) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


TRAIN = """
out = "{out}"
[model]
family = "qwen3"
[model.sizes]
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
vocab_size = 320
num_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 64
[data]
tokenizer = "bytes"
[parallel]
dp = 2
ep = 2
"""


def test_a_trainers_layout_and_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "train.toml", tmp_path / "out/checkpoint"
    file.write_text(TRAIN.format(out=tmp_path / "out"))
    layout = inspect(file, tmp_path / "train.json", capsys)
    assert json.loads(layout.read_text())["meshes"]["sparse"]["shape"] == [1, 1, 2]
    told = json.loads(inspect(file, tmp_path / "dp4.json", capsys, "--dp", "4").read_text())
    assert told["params"]["norm.weight"]["placements"] == ["R", "S(0)", "R"]
    assert told["meshes"]["dense"]["shape"] == [1, 4, 1]
    assert main(["inspect", str(file), "--dense", "shard"]) == 2
    assert "--dense is for an engine" in capsys.readouterr().err
    for option in (["-ep"], ["--names", "a.{}"], ["--model-impl", "vllm"]):
        assert main(["inspect", str(file), *option]) == 2
        assert " is for an engine" in capsys.readouterr().err

    job = job_of(str(file))
    folder.mkdir(parents=True)
    launch._record(job).write(folder)
    built = materialize(build_on_meta(job.trainer.model_spec.model, dtype=torch.float32), "cpu")
    dcp.save(built.state_dict(), checkpoint_id=str(folder / "step-3"))
    found = []
    for source in (file, tmp_path / "out", folder, folder / "step-3"):
        assert main(["plan", str(source), "tp=2,ep=2", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    for facts in found:
        assert facts["bytes"] == facts["lower_bound"] == found[0]["bytes"] > 0
        assert facts["missing"] == {}
