"""Whatever goes wrong: an error of ours, the target as it was, and nothing half-written taken for whole."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from titan_bridge.checkpoint import open_checkpoint
from titan_bridge.checkpoint.execute import Executor, verify
from titan_bridge.checkpoint.reshard import Options, prepare
from titan_bridge.checkpoint.staging import PART, Staging
from titan_bridge.cli import main
from titan_bridge.errors import BridgeError
from titan_bridge.testing import make_checkpoint

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("faults") / "hf", "qwen3_moe", max_shard_size="60KB", tokenizer=False, **SMALL
    )


@pytest.fixture(scope="module")
def dcp_source(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "dcp"
    prepare(Options(source=source, target=path, to="dcp", max_shard_size=60_000)).run()
    return path


def options(source: Path, target: Path, **more) -> Options:
    return Options(
        source=source, target=target, **{"to": "dcp", "max_shard_size": 40_000, "workers": 1, **more}
    )


def contents(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_equal(one: Path, other: Path) -> None:
    a, b = contents(one), contents(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


class Killed(BaseException):
    pass


def stop_after(monkeypatch, parts: int) -> None:
    """The run dies in the middle of a part, after this many were finished."""
    real = Executor._write_strip
    finished: set[str] = set()

    def write(self, opened, strip):
        finished.add(opened.part.name)
        if len(finished) > parts:
            raise Killed
        real(self, opened, strip)

    monkeypatch.setattr(Executor, "_write_strip", write)


def test_resume_keeps_what_is_finished(source, dcp_source, tmp_path, monkeypatch):
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            prepare(options(source, target)).run()
    staging = Staging(target).path
    assert not target.exists()
    assert len(list(staging.glob(f"*{PART}"))) == 1
    done = {path.name: path.stat().st_mtime_ns for path in staging.glob("*.distcp")}
    assert len(done) == 3
    # Another run without --resume would start again; with other options it may not resume.
    with pytest.raises(BridgeError, match="other options"):
        prepare(options(source, target, resume=True, max_shard_size=10**9)).run()
    with pytest.raises(BridgeError, match="other options"):
        prepare(options(source, target, resume=True, dtype=torch.bfloat16)).run()
    outcome = prepare(options(source, target, resume=True, verify=True)).run()
    assert outcome.resumed_parts == 3
    assert {
        path.name: path.stat().st_mtime_ns for path in target.glob("*.distcp") if path.name in done
    } == done
    assert_equal(target, dcp_source)
    assert not staging.exists()
    assert not list(target.glob("*.part")) + list(target.glob("*.json*l"))


def test_without_resume_everything_is_done_again(source, dcp_source, tmp_path, monkeypatch):
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            prepare(options(source, target)).run()
    assert prepare(options(source, target)).run().resumed_parts == 0
    assert_equal(target, dcp_source)


def test_resume_notices_that_the_source_changed(source, tmp_path, monkeypatch):
    copy = tmp_path / "hf"
    shutil.copytree(source, copy)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            prepare(options(copy, tmp_path / "out")).run()
    os.utime(next(copy.glob("*.safetensors")), ns=(1, 1))
    with pytest.raises(BridgeError, match="another source"):
        prepare(options(copy, tmp_path / "out", resume=True)).run()


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_kill_9_leaves_nothing_that_looks_whole(dcp_source, source, tmp_path, delay):
    target = tmp_path / "out"
    # Slow enough to be killed in the middle: a pause before each strip.
    script = (
        "import sys, time\n"
        "from titan_bridge.checkpoint.execute import Executor\n"
        "real = Executor._write_strip\n"
        "def slow(self, *a):\n"
        "    print('strip', flush=True); time.sleep(0.05); real(self, *a)\n"
        "Executor._write_strip = slow\n"
        "from titan_bridge.cli import main\n"
        f"sys.exit(main(['reshard', {str(source)!r}, {str(target)!r}, '--to', 'dcp', '--max-shard-size', '40KB']))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline().startswith(b"strip")  # two threads print
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(BridgeError, match="does not exist"):
        open_checkpoint(target)
    kept = len(list(Staging(target).path.glob("*.distcp")))
    workers = min(4, len(os.sched_getaffinity(0)))
    outcome = prepare(options(source, target, resume=True, workers=workers)).run()
    assert outcome.resumed_parts == kept
    assert_equal(target, dcp_source)


def test_killed_between_the_two_renames_of_an_overwrite(source, dcp_source, tmp_path):
    target = tmp_path / "out"
    shutil.copytree(dcp_source, target)
    target.rename(tmp_path / ".out.old")
    prepare(options(source, target, overwrite=True)).run()
    assert_equal(target, dcp_source)
    assert not (tmp_path / ".out.old").exists()


def limited(size: int):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    return limit


def test_a_full_disk_is_named_and_nothing_is_published(source, dcp_source, tmp_path):
    """A limit on the size of files stands for the disk: a write in the middle of a file fails."""
    target = tmp_path / "out"
    command = [sys.executable, "-m", "titan_bridge.cli", "reshard", source, target, "--to", "dcp"]
    found = subprocess.run([*map(str, command)], preexec_fn=limited(100_000), capture_output=True, text=True)
    assert found.returncode == 2
    assert "the disk is full" in found.stderr
    assert "--resume" in found.stderr
    assert found.stderr.count("\n") == 1
    assert not target.exists()
    prepare(options(source, target)).run()
    assert_equal(target, dcp_source)


def test_too_little_space_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(BridgeError, match="GB free"):
        prepare(options(source, tmp_path / "out")).run()
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_shrinks_during_the_run_is_an_error(source, tmp_path):
    copy = tmp_path / "hf"
    shutil.copytree(source, copy)
    job = prepare(options(copy, tmp_path / "out", workers=2))
    for file in copy.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(BridgeError, match="truncated"):
        job.run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["hf", "dcp"])
def test_a_truncated_file_is_refused_before_anything_is_written(source, dcp_source, tmp_path, kind):
    copy = tmp_path / "copy"
    shutil.copytree(source if kind == "hf" else dcp_source, copy)
    file = sorted(copy.glob("*.safetensors" if kind == "hf" else "*.distcp"))[1]
    for size in (file.stat().st_size - 1, 100, 5, 0):
        os.truncate(file, size)
        with pytest.raises(BridgeError, match=file.name):
            prepare(options(copy, tmp_path / "out", to="engine"))
    file.unlink()
    with pytest.raises(BridgeError, match=file.name):
        prepare(options(copy, tmp_path / "out", to="engine"))
    assert not (tmp_path / "out").exists()


def changed(source: Path, target: Path, change) -> Path:
    state = contents(source)
    change(state)
    target.mkdir()
    save_file(state, target / "model.safetensors")
    shutil.copy(source / "config.json", target)
    return target


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(NORM), f"missing: {NORM}"),
        (lambda state: state.update(extra=torch.zeros(3)), r"unexpected: extra \(3,\)"),
        (
            lambda state: state.update({NORM: torch.zeros(7)}),
            r"model.norm.weight has shape \(7,\), config.json says",
        ),
        (
            lambda state: state.update({NORM: state[NORM].to(torch.int8)}),
            "dtype torch.int8; weights are floating",
        ),
    ],
)
@pytest.mark.parametrize("to", ["dcp", "engine"])
def test_tensors_that_do_not_fit_are_named(source, tmp_path, change, message, to):
    copy = changed(source, tmp_path / "copy", change)
    with pytest.raises(BridgeError, match=message):
        prepare(options(copy, tmp_path / "out", to=to))


def test_all_problems_are_in_one_line(source, tmp_path):
    def change(state):
        state.pop(NORM)
        state["what"] = torch.zeros(1)

    with pytest.raises(BridgeError, match=r"(?s)missing: .*unexpected: what"):
        prepare(options(changed(source, tmp_path / "copy", change), tmp_path / "out"))


def test_mixed_dtypes_ask_for_one(source, tmp_path):
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    copy = changed(source, tmp_path / "copy", lambda state: state.update({name: state[name].half()}))
    with pytest.raises(BridgeError, match="--dtype"):
        prepare(options(copy, tmp_path / "out"))
    prepare(options(copy, tmp_path / "out", dtype=torch.bfloat16)).run()
    # Between the same names nothing is put together, so each keeps its own.
    prepare(options(copy, tmp_path / "hf", to="hf")).run()
    assert contents(tmp_path / "hf")[name].dtype == torch.float16


def test_paths_that_must_not_be_written(source, dcp_source, tmp_path):
    before = snapshot(source)
    with pytest.raises(BridgeError, match="SRC and DST are both"):
        prepare(options(source, source / "." / ".." / source.name, overwrite=True))
    with pytest.raises(BridgeError, match="SRC lies inside DST"):
        prepare(options(source, source.parent, overwrite=True))
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(BridgeError, match="SRC and DST are both"):
        prepare(options(source, link, overwrite=True))
    other = tmp_path / "other"
    other.symlink_to(dcp_source)
    with pytest.raises(BridgeError, match="symbolic link"):
        prepare(options(source, other, overwrite=True))
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("my only copy")
    with pytest.raises(BridgeError, match="not empty"):
        prepare(options(source, full))
    with pytest.raises(BridgeError, match="no checkpoint"):
        prepare(options(source, full, overwrite=True))
    with pytest.raises(BridgeError, match="is a file"):
        prepare(options(source, full / "thesis.txt"))
    assert snapshot(source) == before
    assert snapshot(full) == {"thesis.txt": b"my only copy"}


def test_overwrite_replaces_a_checkpoint_when_the_new_one_is_complete(
    source, dcp_source, tmp_path, monkeypatch
):
    target = tmp_path / "out"
    shutil.copytree(source, target)
    before = snapshot(target)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            prepare(options(source, target, overwrite=True)).run()
    assert snapshot(target) == before
    prepare(options(source, target, overwrite=True, resume=True)).run()
    assert_equal(target, dcp_source)
    assert not list(target.glob("*.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_two_runs_do_not_meet_in_one_target(source, tmp_path):
    job = prepare(options(source, tmp_path / "out"))
    staging = Staging(tmp_path / "out")
    staging.begin("someone else", resume=False)
    with pytest.raises(BridgeError, match="another process is writing"):
        job.run()
    staging.release()
    job.run()


def test_a_directory_in_the_way_of_the_staging_is_not_removed(source, tmp_path):
    precious = tmp_path / ".out.partial" / "file"
    precious.parent.mkdir()
    precious.write_text("x")
    with pytest.raises(BridgeError, match="not ours"):
        prepare(options(source, tmp_path / "out")).run()
    assert precious.exists()


def test_verify_finds_a_flipped_bit(source, tmp_path, monkeypatch):
    real = Staging.finish

    def flip(self, result, rank, *, fsync):
        file = self.path / (next(iter(result.spans)) + PART)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        real(self, result, rank, fsync=fsync)

    monkeypatch.setattr(Staging, "finish", flip)
    with pytest.raises(BridgeError, match="are not what was written"):
        prepare(options(source, tmp_path / "out", verify=True)).run()
    assert not (tmp_path / "out").exists()


def test_checksums_cover_every_byte(source, tmp_path):
    job = prepare(options(source, tmp_path / "out", to="hf", fsync=True))
    results = []
    real = Staging.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Staging,
            "finish",
            lambda self, result, *a, **k: (results.append(result), real(self, result, *a, **k)),
        )
        job.run()
    verify(tmp_path / "out", results)
    for result in results:
        for file, spans in result.spans.items():
            at = 0
            for span in sorted(spans, key=lambda span: span.offset):
                assert span.offset == at
                at += span.length
            assert at == (tmp_path / "out" / file).stat().st_size


def corrupted(data: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, removed, added, repeated or cut off."""
    result = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        at = generator.randrange(len(result))
        how = generator.randrange(6)
        if how == 0:
            result[at] = generator.randrange(256)
        elif how == 1:
            result[at] ^= 1 << generator.randrange(8)
        elif how == 2:
            del result[at : at + generator.randrange(1, 9)]
        elif how == 3:
            result[at:at] = bytes(generator.randrange(256) for _ in range(generator.randrange(1, 9)))
        elif how == 4:
            other = generator.randrange(len(result))
            length = generator.randrange(1, 17)
            result[at : at + length] = result[other : other + length]
        else:
            del result[max(1, at) :]
        if not result:
            result = bytearray(b"\0")
    return bytes(result)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """The same three tensors in three files' worth of headers."""
    base = tmp_path_factory.mktemp("tiny")
    state = {
        "layers.0.a": torch.arange(12.0).reshape(3, 4),
        "layers.1.b": torch.ones(5),
        "layers.2.c": torch.zeros(2, 2),
    }
    dcp.save({**state, "train_state": {"step": 3}}, checkpoint_id=base / "dcp", no_dist=True)
    (base / "hf").mkdir()
    save_file(state, base / "hf/model.safetensors", metadata={"format": "pt"})
    (base / "sharded").mkdir()
    save_file(state, base / "sharded/model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(state, "model-00001-of-00001.safetensors")
    (base / "sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return {name: base / name for name in ("dcp", "hf", "sharded")}


@pytest.mark.parametrize(
    ("kind", "file", "rounds"),
    [
        ("dcp", ".metadata", 3500),
        ("dcp", "__0_0.distcp", 2500),
        ("hf", "model.safetensors", 2500),
        ("sharded", "model.safetensors.index.json", 1500),
    ],
)
@pytest.mark.timeout(600)
def test_ten_thousand_corruptions(tiny, tmp_path, kind, file, rounds):
    """An error of ours each time, or tensors of the shapes and dtypes that were there, with the right values.

    A change of the weights' own bytes, or of a name, is no damage that a header could show: such a tensor is looked
    at only for its shape. That names are those of the model is checked when a checkpoint is resharded.
    """
    right = contents(tiny[kind])
    work = tmp_path / "work"
    shutil.copytree(tiny[kind], work)
    data = (work / file).read_bytes()
    generator = random.Random(f"{kind}{file}")
    refused = 0
    for number in range(rounds):
        bad = corrupted(data, generator)
        (work / file).write_bytes(bad)
        try:
            found = contents(work)
        except BridgeError:
            refused += 1
            continue
        for name, tensor in found.items():
            if name in right and file in (".metadata", "model.safetensors.index.json"):
                assert torch.equal(tensor, right[name]), (number, name)
            elif name in right:
                assert tensor.numel() == right[name].numel(), (number, name)
    assert refused > rounds // 4


def test_the_command_line_prints_one_line_and_exits_with_2(source, tmp_path, capsys):
    assert main(["reshard", str(source), str(source), "--to", "dcp"]) == 2
    assert main(["reshard", str(tmp_path), str(tmp_path / "x"), "--to", "dcp"]) == 2
    assert main(["reshard", str(source), str(tmp_path / "x"), "--to", "hf", "--tp", "2"]) == 2
    assert main(["reshard", str(source), str(tmp_path / "x"), "--to", "engine", "--tp", "3"]) == 2
    assert (
        main(["reshard", str(source), str(tmp_path / "x"), "--to", "dcp", "--max-shard-size", "5 apples"])
        == 2
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 5
    assert "tp=3 does not divide" in err
    assert "'5 apples' is not a size" in err


def test_dry_run_says_what_would_happen_and_writes_nothing(source, tmp_path, capsys):
    arguments = [
        "reshard",
        str(source),
        str(tmp_path / "x"),
        "--to",
        "engine",
        "--tp",
        "2",
        "--ep",
        "2",
        "--json",
    ]
    assert main([*arguments, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert main(arguments) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["bytes_written"] == planned["bytes_to_write"]
    assert done["bytes_read"] >= planned["bytes_to_read"] == sum(t.nbytes for t in contents(source).values())
    for file in planned["target"]["files"]:
        assert (tmp_path / "x" / file["name"]).stat().st_size == file["bytes"]


def test_nan_makes_the_exit_code_1(source, tmp_path, capsys):
    copy = changed(source, tmp_path / "nan", lambda state: state[NORM].fill_(float("nan")))
    arguments = ["reshard", str(copy), str(tmp_path / "x"), "--to", "dcp"]
    assert main(arguments) == 1
    assert "32 weights are NaN: norm.weight (32)" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--allow-nan"]) == 0
