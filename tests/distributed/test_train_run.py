"""`titan-bridge train`, started as a user does: layouts agree, a killed run goes on bit for bit, a full disk does
no harm."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from tests.forked_training import forked_training
from titan_bridge import cli
from titan_bridge.models import family_for
from titan_bridge.models.adapters import keep_expert_dtype, use_plain_attention
from titan_bridge.models.build import build_on_meta, materialize
from titan_bridge.run_folder import find, whole_steps
from titan_bridge.sharding import Layout
from titan_bridge.train import data
from titan_bridge.train.progress import read_metrics

COMMAND = Path(sys.executable).parent / "titan-bridge"

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("no_orphans")]

LLAMA = """
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
"""
MOE = """
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
num_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 64
"""


def toml(folder: Path, *, family: str = "llama3", sizes: str = LLAMA, steps: int = 8) -> Path:
    """A small run on the standard library's sources, in tokens of bytes."""
    file = folder / f"{family}.toml"
    file.write_text(
        f"""lr = 3e-3
[model]
family = "{family}"
[model.sizes]{sizes}
[data]
tokenizer = "bytes"
[trainer]
activation_checkpoint = "none"
training = {{ steps = {steps}, seq_len = 64, local_batch_size = 4 }}
lr_scheduler.warmup_steps = 2
metrics.log_freq = 1
checkpoint.interval = 3
"""
    )
    return file


def run(file: Path, out: Path, *options: str, limit: int | None = None, status: int = 0):
    """Run the command to its end; `limit` is the largest file that it may write."""

    def shrink() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [COMMAND, "train", file, "--out", out, *options],
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=shrink,
    )
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done


def train(file: Path, out: Path, *options: str) -> None:
    """The command in this process, with ranks that are forked."""
    with forked_training():
        assert cli.main(["train", str(file), "--out", str(out), *options]) == 0
    logging.disable(logging.NOTSET)  # the command has its process to itself


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str, str], Path]:
    """The output folder of a run of 8 steps in one layout; each is trained once."""
    folders: dict[tuple[str, str], Path] = {}

    def once(family: str, layout: str) -> Path:
        if (family, layout) not in folders:
            folder = tmp_path_factory.mktemp("train")
            file = toml(folder, family=family, sizes=MOE if family == "qwen3" else LLAMA)
            train(file, folder / "out", *(f"--set=parallel.{size}" for size in layout.split()))
            folders[family, layout] = folder / "out"
        return folders[family, layout]

    return once


def tensors(step: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by the names that nested dicts make."""
    metadata = FileSystemReader(step).read_metadata().state_dict_metadata
    names = {name for name, entry in metadata.items() if hasattr(entry, "size")}
    found: dict[str, torch.Tensor] = {}

    def flatten(values: dict, prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                flatten(value, f"{prefix}{key}.")
            else:
                found[f"{prefix}{key}"] = value

    flatten(_load_state_dict_from_keys(names, checkpoint_id=str(step)), "")
    return found


def losses(out: Path) -> dict[int, tuple[float, float]]:
    """Step -> loss and gradient norm, as they were logged, to the last bit."""
    return {
        step: (entry["loss"], entry["grad_norm"])
        for step, entry in read_metrics(out / "metrics.jsonl").items()
    }


@pytest.mark.timeout(400)
def test_killed_it_goes_on_from_the_last_whole_checkpoint_bit_for_bit(trained, tmp_path, capfd):
    unbroken = trained("llama3", "dp=2")
    file, broken = toml(tmp_path), tmp_path / "broken"

    command = [COMMAND, "train", file, "--out", broken, "--set=parallel.dp=2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list(whole_steps(broken / "checkpoint")) == [3]
    assert max(losses(broken)) < 8

    capfd.readouterr()
    train(file, broken, "--set=parallel.dp=2")
    printed = capfd.readouterr().out
    assert "on from step 3" in printed
    assert printed.endswith(f"next: titan-bridge serve {broken}\n")
    expected = losses(unbroken)
    assert sorted(expected) == list(range(1, 9))
    assert losses(broken) == expected

    ours, theirs = tensors(find(broken).directory), tensors(find(unbroken).directory)
    assert ours.keys() == theirs.keys()
    assert any("exp_avg" in name for name in ours)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.timeout(400)
def test_a_full_disk_and_a_final_export_leave_whole_checkpoints_and_the_run_goes_on(
    trained, tmp_path, capsys
):
    file, out = toml(tmp_path), tmp_path / "out"
    ignore = shutil.ignore_patterns("step-6", "step-8")  # as if it had been told to end at step 3
    shutil.copytree(trained("llama3", "dp=2"), out, ignore=ignore)
    kept = (out / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]
    (out / "metrics.jsonl").write_text("".join(kept))
    before = tensors(out / "checkpoint/step-3")

    # A limit on the size of a file fails a write as a full disk does, and needs no mount.
    failed = run(file, out, "--set=parallel.dp=2", limit=300_000, status=2)
    narrow, message = failed.stderr.strip().splitlines()
    assert (
        "can be trained, but not served here: head_dim=16 has no kernel in vLLM's attention on CPUs" in narrow
    )
    assert "a checkpoint could not be saved" in message
    assert "the last whole checkpoint is step-3; make room and run the same command" in message
    assert list(whole_steps(out / "checkpoint")) == [3]
    assert not (out / "checkpoint/step-6").exists()
    after = tensors(out / "checkpoint/step-3")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    # The end as a Hugging Face export, which is kept and served, and which TorchTitan cannot go on from.
    in_hf = [f"--set=trainer.checkpoint.last_save_{what}=true" for what in ("model_only", "in_hf")]
    train(file, out, "--set=parallel.dp=2", *in_hf)
    assert "going on from step 3" in capsys.readouterr().out
    export = find(out).directory
    exported = {path.name: path.stat().st_mtime_ns for path in export.rglob("*")}
    assert (export.name, (export / ".metadata").exists()) == ("step-8", False)
    more = ("--set=trainer.training.steps=10", "--set=trainer.checkpoint.keep_latest_k=0")
    train(file, out, "--set=parallel.dp=2", *more)
    printed = capsys.readouterr().out
    assert "going on from step 6" in printed
    assert "step 8 is of the training that this one replaces; set aside as replaced-8" in printed
    aside = export.with_name("replaced-8")
    assert {path.name: path.stat().st_mtime_ns for path in aside.rglob("*")} == exported
    assert sorted(losses(out)) == list(range(1, 11))
    assert find(out).step == 10


SAME_TEXT = [
    ("llama3", "dp=2", "dp=2 tp=2"),
    ("qwen3", "dp=2", "dp=2 ep=2"),
    ("llama3", "dp=4", "dp_replicate=2 dp=2"),
]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("family", "one", "other"), SAME_TEXT)
def test_layouts_compute_the_same_training(trained, family, one, other):
    """Same weights to begin with, same text: the losses are those of another layout but for rounding."""
    found = [[loss for loss, _ in losses(trained(family, layout)).values()][:4] for layout in (one, other)]
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1], abs=2e-4)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("family", "layout"), [("llama3", "dp=2 tp=2"), ("qwen3", "dp=2 ep=2")])
def test_what_was_saved_is_what_was_trained(trained, family, layout):
    """The record and a checkpoint alone give a model whose loss on the next batch is what the run logged for it."""
    out = trained(family, layout)
    run = find(out / "checkpoint/step-3")
    hf = json.loads((run.folder / "config.json").read_text())
    assert hf == run.record.hf_config
    kind = family_for(hf)
    assert kind.name == run.record.family == family
    config = kind.model_config(hf)
    use_plain_attention(config)
    keep_expert_dtype(config)
    model = materialize(build_on_meta(config, dtype=torch.float32), "cpu")
    assert not model.load_state_dict(tensors(run.directory), strict=False).missing_keys
    ranks = run.record.sizes["dp"] * run.record.sizes["dp_replicate"]
    batches = [batch(out, rank, ranks, number=3) for rank in range(ranks)]
    with torch.no_grad():
        total = sum(
            float(torch.nn.functional.cross_entropy(model(x, p).flatten(0, 1), y.flatten(), reduction="sum"))
            for x, p, y in batches
        )
    mean = total / sum(y.numel() for _, _, y in batches)
    assert mean == pytest.approx(losses(out)[4][0], abs=1e-5)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("family", "layout"), [("llama3", "dp=2 tp=2"), ("qwen3", "dp=2 ep=2")])
def test_the_layout_that_inspect_shows_is_where_the_trainer_held_each_part(
    trained, family, layout, tmp_path, capsys
):
    file = toml(tmp_path, family=family, sizes=MOE if family == "qwen3" else LLAMA)
    assert (
        cli.main(["inspect", str(file), *(f"--set=parallel.{size}" for size in layout.split()), "--json"])
        == 0
    )
    shown = Layout.from_json(json.loads(capsys.readouterr().out))
    saved = FileSystemReader(find(trained(family, layout)).directory).read_metadata().state_dict_metadata
    common = shown.params.keys() & saved.keys()  # wqkv is wq, wk and wv in a checkpoint
    assert len(shown.params.keys() - common) == 2
    for name in common:
        chunks = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in saved[name].chunks}
        boxes = {piece.box for rank in shown.ranks for piece in shown.pieces(name, rank)}
        assert {(box.start, box.shape) for box in boxes} == chunks, name


@pytest.mark.timeout(400)
def test_tensorboard_has_torchtitans_own_metrics(trained):
    folder = trained("llama3", "dp=2") / "tb"
    (file,) = folder.rglob("events.out.*")
    events = event_accumulator.EventAccumulator(str(file)).Reload()
    logged = {event.step: event.value for event in events.Scalars("loss_metrics/global_avg_loss")}
    assert logged == pytest.approx(
        {step: loss for step, (loss, _) in losses(folder.parent).items()}, rel=1e-6
    )
    assert "throughput(tps)" in events.Tags()["scalars"]


def batch(
    out: Path, rank: int, ranks: int, *, number: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and labels that a data rank sees in step `number` + 1, through TorchTitan's data loader."""
    from torchtitan.components.tokenizer import HuggingFaceTokenizer
    from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

    data.register()
    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=str(out / "checkpoint"))
    loader = HuggingFaceTextDataLoader.Config(
        dataset=data.NAME, dataset_path=str(out / "documents.json")
    ).build(dp_world_size=ranks, dp_rank=rank, tokenizer=tokenizer, seq_len=64, local_batch_size=4)
    for index, (inputs, labels) in enumerate(loader):
        if index == number:
            return inputs["input"], inputs["positions"], labels
    raise AssertionError


def test_no_two_runs_share_a_folder(tmp_path, capsys):
    file = toml(tmp_path, steps=1000)
    command = [COMMAND, "train", file, "--out", tmp_path / "out"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        for line in process.stdout:
            if line.startswith("step"):
                break
        assert cli.main(["train", str(file), "--out", str(tmp_path / "out")]) == 2
        assert "another run trains in" in capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert not list(tmp_path.glob("torchelastic_*")), "torchrun's own logs are left"
