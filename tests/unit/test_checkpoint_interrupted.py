"""A run that stops in the middle: nothing half-written is taken for whole, and `--resume` goes on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.unit.checkpoint_samples import Killed, assert_equal, options, stop_after
from titan_bridge.checkpoint import open_checkpoint
from titan_bridge.checkpoint.execute import Executor
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.checkpoint.staging import PART, Staging
from titan_bridge.errors import BridgeError


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


@pytest.mark.parametrize("resume", [False, True])
def test_killed_after_any_step_of_clearing_away_an_older_run(
    source, dcp_source, tmp_path, monkeypatch, resume
):
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            prepare(options(source, target)).run()
    staging = Staging(target).path
    files = len(list(staging.iterdir())) - 2  # beside the plan and the lock
    assert files == 2 + 1 + 1  # finished, in part, the journal
    for name in (*["unlink"] * files, "rename", "write_bytes"):
        real = getattr(Path, name)

        def step(self, *arguments, name=name, real=real):
            real(self, *(text[:9] if name == "write_bytes" else text for text in arguments))
            if self.parent == staging:
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, name, step)
            prepare(options(source, target)).run()
    assert prepare(options(source, target, resume=resume)).run().resumed_parts == 0
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


def test_resume_knows_its_source_from_another_directory(source, dcp_source, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    for directory, stopped in ((tmp_path, True), (tmp_path / "below", False)):
        monkeypatch.chdir(directory)
        run = prepare(options(Path(os.path.relpath(source)), tmp_path / "out", resume=not stopped)).run
        if stopped:
            with monkeypatch.context() as patch, pytest.raises(Killed):
                stop_after(patch, 2)
                run()
        else:
            assert run().resumed_parts == 2
    assert_equal(tmp_path / "out", dcp_source)


def test_a_strip_that_fails_closes_no_file_under_another(source, tmp_path, monkeypatch):
    second, found = threading.Event(), []

    def write(self, opened, strip):
        if strip == opened.file.strips[0]:
            assert second.wait(10)
            raise OSError(errno.EIO, "bad")
        second.set()
        time.sleep(0.2)
        found.append(os.path.samestat(os.fstat(opened.descriptor), os.stat(part)))
        return (0, 0, 0), {}

    job = prepare(options(source, tmp_path / "out", workers=2, max_shard_size=10**9))
    part = Staging(tmp_path / "out").path / (job.target.files[0].name + PART)
    assert len(job.target.files[0].strips) > 1
    monkeypatch.setattr(Executor, "_write_strip", write)
    with pytest.raises(BridgeError, match="bad"):
        job.run()
    assert found == [True] * len(found) != []


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_kill_9_leaves_nothing_that_looks_whole(dcp_source, source, tmp_path, delay):
    target = tmp_path / "out"
    # Slow enough to be killed in the middle: a pause before each strip.
    script = (
        "import sys, time\n"
        "from titan_bridge.checkpoint.execute import Executor\n"
        "real = Executor._write_strip\n"
        "def slow(self, *a):\n"
        "    print('strip', flush=True); time.sleep(0.05); return real(self, *a)\n"
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
    with pytest.raises(BridgeError, match="not empty"):  # and not only when everything is written
        prepare(options(source, target)).run(lambda what, count: pytest.fail("something was written"))
    target.rename(tmp_path / ".out.old")
    prepare(options(source, target, overwrite=True)).run()
    assert_equal(target, dcp_source)
    assert not (tmp_path / ".out.old").exists()


def limited(size: int):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    return limit


@pytest.mark.parametrize("small", [False, True])
def test_a_full_disk_is_named_and_nothing_is_published(source, dcp_source, tmp_path, small):
    """A limit on the size of files stands for the disk: a write in the middle of a file fails."""
    target = tmp_path / "out"
    copy = tmp_path / "hf"
    shutil.copytree(source, copy)
    command = [sys.executable, "-m", "titan_bridge.cli", "reshard", copy, target, "--to", "dcp"]
    command += ["--max-shard-size", "40KB"] if small else []
    (copy / "tokenizer.json").write_text("x" * 200_000)  # copied at the end
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
