"""The output folder: found from any path in it, and never gone on with as another model's."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from titan_bridge.checkpoint import open_checkpoint
from titan_bridge.checkpoint.job import Options
from titan_bridge.checkpoint.model_dir import weights_directory
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.checks import weights_fit
from titan_bridge.config import reader
from titan_bridge.config.train_schema import TrainConfig
from titan_bridge.errors import BridgeError
from titan_bridge.models.build import build_on_meta, materialize
from titan_bridge.run_folder import METADATA, RECORD, Record, find, model_and_step, whole_steps
from titan_bridge.train import launch, output
from titan_bridge.train.build import Job, build
from titan_bridge.train.data import find_documents
from titan_bridge.train.guard import lock
from titan_bridge.train.progress import duration, forget_after, read_metrics

TOML = """
out = "{out}"
[model]
family = "llama3"
[model.sizes]
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 1
num_attention_heads = 4
[data]
tokenizer = "bytes"
"""


@pytest.fixture
def job(tmp_path):
    def make(*sets: str) -> Job:
        (tmp_path / "a.toml").write_text(TOML.format(out=tmp_path / "out"))
        resolved = reader.resolve(TrainConfig, file=tmp_path / "a.toml", sets=sets)
        return build(resolved.config, resolved.origin)

    return make


@pytest.fixture
def trained(job, tmp_path):
    """An output folder with checkpoints of steps 2 and 4, and one of step 6 that was not written to its end."""
    made = job()
    folder = tmp_path / "out/checkpoint"
    folder.mkdir(parents=True)
    launch._record(made).write(folder)
    find_documents(made.config.data, ranks=1).write(tmp_path / "out" / output.DOCUMENTS)
    model = materialize(build_on_meta(made.trainer.model_spec.model, dtype=torch.float32), "cpu")
    for step in (2, 4):
        state = {**model.state_dict(), "train_state": {"step": step}}
        dcp.save(state, checkpoint_id=str(folder / f"step-{step}"))
    (folder / "step-6").mkdir()
    (folder / "step-6/__0_0.distcp").write_bytes(b"half")
    return folder


def test_found_from_every_path(trained, tmp_path):
    for path, step in ((tmp_path / "out", 4), (trained, 4), (trained / "step-2", 2)):
        run = find(path)
        assert (run.folder, run.step, run.directory) == (trained, step, trained / f"step-{step}")
        assert run.record.family == "llama3"
        assert run.record.hf_config["hidden_size"] == 64


def test_what_is_not_a_run_is_refused(trained, tmp_path):
    with pytest.raises(BridgeError, match="no whole checkpoint of step 6; whole ones: 2, 4"):
        find(trained / "step-6")
    with pytest.raises(
        BridgeError, match=r"has no titan_bridge\.json; give the output folder of titan-bridge train"
    ):
        find(tmp_path)
    (trained / RECORD).write_text("{")
    with pytest.raises(BridgeError, match="cannot be read as a training record"):
        find(trained)


def test_partial_checkpoints_do_not_count_and_are_removed(trained):
    assert whole_steps(trained) == {2: "dcp", 4: "dcp"}
    assert output.remove_partial(trained) == (6,)
    assert whole_steps(trained) == {2: "dcp", 4: "dcp"}
    assert not (trained / "step-6").exists()


@pytest.fixture
def exported(trained):
    """The same with the Hugging Face export of step 5, in several files."""
    prepare(
        Options(
            source=trained / "step-4",
            target=trained / "step-5",
            to="hf",
            config=trained,
            max_shard_size=100_000,
        )
    ).run()
    (trained / "step-5/config.json").unlink()  # TorchTitan's export has none
    assert len(list((trained / "step-5").glob("model-*.safetensors"))) > 1
    return trained


def test_an_export_is_a_whole_step_and_the_last_one_is_taken(exported, tmp_path):
    assert whole_steps(exported) == {2: "dcp", 4: "dcp", 5: "hf"}
    for path in (tmp_path / "out", exported, exported / "step-5"):
        assert model_and_step(path) == (str(exported), 5)
        assert weights_directory(str(path)) == exported / "step-5"
        assert find(path).directory == exported / "step-5"
    assert model_and_step(tmp_path / "out", 2) == (str(exported), 2)
    with pytest.raises(BridgeError, match="step-5 is one step, and step 2 is asked for"):
        model_and_step(exported / "step-5", 2)
    weights_fit(str(tmp_path / "out"), None, find(exported).record.hf_config)
    prepare(Options(source=tmp_path / "out", target=tmp_path / "hf", to="hf")).run()
    assert (tmp_path / "hf/config.json").is_file()
    with open_checkpoint(tmp_path / "hf") as ours, open_checkpoint(exported / "step-5") as export:
        for name in export.tensors:  # bits, since what was never trained may be NaN
            assert torch.equal(*(held.read(name).view(torch.uint8) for held in (ours, export))), name


def test_an_export_is_kept_and_training_goes_on_from_before_it(exported, job):
    assert output.remove_partial(exported) == (6,)
    assert launch._last_to_go_on_from(job(), exported) == 4
    told = []
    assert not launch.train(job("trainer.training.steps=5"), told.append)
    assert [line.partition(": ")[2] for line in told] == [
        "nothing to do, step 5 is there and trainer.training.steps is 5"
    ]
    for step in (2, 4):
        shutil.rmtree(exported / f"step-{step}")
    with pytest.raises(BridgeError, match=r"exports of the weights only \(step 5\)"):
        launch.train(job())
    next((exported / "step-5").glob("*-00002-of-*")).unlink()
    assert whole_steps(exported) == {}
    assert output.remove_partial(exported) == (5,)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["model.sizes.hidden_size=128"], "another model: .*hidden_size = 64 there, 128 here"),
        (["model.sizes.num_hidden_layers=2"], "another model: num_hidden_layers = 1 there, 2 here"),
        (["data.seed=1"], "a run on other data: seed = 0 there, 1 here"),
        (["parallel.dp=2"], r"dp_replicate \* dp = 1, and here it is 2"),
        (["model.family=qwen3"], "family llama3 there, qwen3 here"),
    ],
)
def test_a_checkpoint_folder_of_another_run_is_refused(job, trained, sets, message):
    with pytest.raises(BridgeError, match=message):
        launch.train(job(*sets))
    assert whole_steps(trained) == {2: "dcp", 4: "dcp"}
    assert (trained / "step-6").exists(), "nothing is changed before everything was checked"


def test_checkpoints_without_a_record_and_tensors_of_another_model_are_refused(job, trained):
    other = job("model.sizes.intermediate_size=64")
    with pytest.raises(
        BridgeError, match=r"w1.weight is \(128, 64\) there, \(64, 64\) here; choose another out"
    ):
        launch.check_checkpoint(other, trained / "step-4")
    deeper = job("model.sizes.num_hidden_layers=2")
    with pytest.raises(BridgeError, match=r"it has no layers\.1\."):
        launch.check_checkpoint(deeper, trained / "step-4")
    launch.check_checkpoint(job(), trained / "step-4")
    (trained / "step-4" / METADATA).write_bytes(b"nonsense")
    with pytest.raises(BridgeError, match="cannot be read as a checkpoint"):
        launch.check_checkpoint(job(), trained / "step-4")
    (trained / RECORD).unlink()
    with pytest.raises(BridgeError, match=r"holds checkpoints without titan_bridge\.json"):
        launch.train(job())


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self):
        return open, (str(self._proof), "w")


@pytest.mark.parametrize("initial", [False, True])
def test_metadata_that_names_code_is_refused_before_it_is_unpickled(job, trained, tmp_path, initial):
    step, proof, sets = trained / "step-4", tmp_path / "proof", []
    if initial:
        step, sets = tmp_path / "other", [f"trainer.checkpoint.initial_load_path={tmp_path / 'other'}"]
        step.mkdir()
        shutil.rmtree(trained)
    (step / METADATA).write_bytes(pickle.dumps(Hostile(proof)))
    with pytest.raises(BridgeError, match="which no checkpoint needs; refused, nothing was run"):
        launch.train(job(*sets))
    assert not proof.exists()


@contextlib.contextmanager
def files_of_at_most(size: int):
    """A limit on the size of a file fails a write as a full disk does, and needs no mount."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_before_the_first_step_harms_no_checkpoint(job, trained, tmp_path):
    record = (trained / RECORD).read_bytes()
    with files_of_at_most(1000), pytest.raises(BridgeError, match="out cannot be written: File too large"):
        launch.train(job())
    assert whole_steps(trained) == {2: "dcp", 4: "dcp"}
    assert (trained / RECORD).read_bytes() == record
    assert find(trained).step == 4

    (tmp_path / "a.txt").write_text("a few words\n" * 20)  # its list fits, its tokenizer does not
    new = job(f"out={tmp_path / 'new'}", f"data.path={tmp_path / 'a.txt'}")
    with files_of_at_most(1000), pytest.raises(BridgeError, match="new cannot be written: File too large"):
        launch.train(new)
    assert (tmp_path / "new" / output.DOCUMENTS).is_file()


def test_longer_training_and_another_tp_may_go_on(job, trained):
    for sets in (["trainer.training.steps=99"], ["parallel.tp=2"], ["lr=0.5"]):
        output.check_same_run(trained, launch._record(job(*sets)))


def test_the_record_says_everything_again(job, trained):
    record = Record.read(trained)
    assert dataclasses.replace(record) == record
    config = reader.from_dict(TrainConfig, record.config)
    again = build(config, record.origin)
    assert again.hf_config == record.hf_config == job().hf_config
    assert record.trainer["training"]["steps"] == again.trainer.training.steps
    assert set(record.versions) == {"titan_bridge", "torchtitan", "torch"}


def test_a_lock_ends_with_its_holder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from titan_bridge.train.guard import lock;"
        "lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        started = time.monotonic()
        with pytest.raises(BridgeError, match="another run trains in"):
            lock(tmp_path, wait=60)  # no waiting for a run that lives
        assert time.monotonic() - started < 30
    finally:
        holder.kill()
        holder.communicate()
    started = time.monotonic()
    lock(tmp_path, wait=60)
    assert time.monotonic() - started < 30


def test_metrics_survive_a_crash_and_the_last_time_counts(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == {}
    file.write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo'
    )
    assert {step: entry["loss"] for step, entry in read_metrics(file).items()} == {1: 3.0, 2: 1.0}


def test_a_run_begins_with_the_records_of_the_steps_before_it(tmp_path):
    file = tmp_path / "metrics.jsonl"
    forget_after(file, -1)
    assert not file.exists()
    file.write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 9, "loss": 1.0}\n{"step": 10, "lo'
    )
    forget_after(file, 2)
    assert file.read_text() == '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'
    forget_after(file, -1)
    assert read_metrics(file) == {}


def test_checkpoints_after_the_beginning_are_set_aside(trained, job):
    torchtitans = re.compile(r"step-(\d+)")  # searched for anywhere in a name
    (trained / "replaced-4").mkdir()
    assert output.set_aside(trained, 2) == {4: "replaced-4-2", 6: "replaced-6"}
    assert (trained / "replaced-4-2" / METADATA).is_file()
    assert [path.name for path in trained.iterdir() if torchtitans.search(path.name)] == ["step-2"]


def test_a_step_that_was_asked_for_and_is_the_last_is_nothing_to_do(trained, job):
    told = []
    assert not launch.train(job("trainer.checkpoint.load_step=4", "trainer.training.steps=4"), told.append)
    assert "nothing to do, step 4 is there and trainer.training.steps is 4" in told[0]
    assert whole_steps(trained) == {2: "dcp", 4: "dcp"}


def test_checkpoints_that_training_would_not_read_are_refused(trained, job):
    with pytest.raises(BridgeError, match=r"step 2, 4\), and with trainer\.checkpoint\.enable = false"):
        launch.train(job("trainer.checkpoint.enable=false"))


def test_going_on_needs_the_list_of_documents(trained, job, tmp_path):
    (tmp_path / "out" / output.DOCUMENTS).unlink()
    with pytest.raises(
        BridgeError, match=r"documents\.json, which says .*; restore it, or choose another out"
    ):
        launch.train(job())
    (tmp_path / "out" / output.DOCUMENTS).write_text('{"pieces": 3}')
    with pytest.raises(BridgeError, match=r"documents\.json, which says"):
        launch.train(job())


def test_a_run_is_locked_before_its_checkpoints_are_read_and_free_after_any_refusal(trained, job, tmp_path):
    held = lock(tmp_path / "out")
    try:
        with pytest.raises(BridgeError, match="another run trains in"):
            launch.train(job("model.sizes.hidden_size=128"))
    finally:
        os.close(held)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BridgeError, match="another model"):
        launch.train(job("model.sizes.hidden_size=128"))
    with files_of_at_most(1000), pytest.raises(BridgeError, match="out cannot be written"):
        launch.train(job())
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(lock(tmp_path / "out", wait=0))


def test_durations():
    assert [duration(s) for s in (0.4, 59, 112, 3725)] == ["0 s", "59 s", "1 min 52 s", "1 h 2 min"]
