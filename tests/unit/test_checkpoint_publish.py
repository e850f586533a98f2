"""How a finished run takes its target's place, whatever kills it; and targets whose place cannot be taken."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from tests.unit.checkpoint_samples import Killed, assert_equal, options, snapshot, stop_after
from titan_bridge.checkpoint import staging
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.checkpoint.staging import Staging
from titan_bridge.cli import main
from titan_bridge.errors import BridgeError


@pytest.fixture
def target(source, tmp_path) -> Path:
    """A checkpoint that is to be replaced, and nothing beside it."""
    shutil.copytree(source, tmp_path / "home" / "out")
    return tmp_path / "home" / "out"


def kill_at(patch, step: int) -> list[str]:
    """The run dies before the change with this number that `publish` makes; returns the changes before that."""
    publish, done, publishing = Staging.publish, [], []

    def counted(name, real):
        def change(*arguments, **more):
            if publishing:
                if len(done) == step:
                    raise Killed
                done.append(name)
            return real(*arguments, **more)

        return change

    def watched(self, *arguments, **more):
        publishing.append(True)
        publish(self, *arguments, **more)

    patch.setattr(Staging, "publish", watched)
    for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "rmdir"), (staging, "exchange")):
        patch.setattr(owner, name, counted(name, getattr(owner, name)))
    return done


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_killed_before_each_step_of_an_overwrite(
    source, dcp_source, tmp_path, monkeypatch, can_exchange, resume
):
    before = snapshot(source)
    for step in range(20):
        home = tmp_path / str(step)
        target = home / "out"
        shutil.copytree(source, target)
        with monkeypatch.context() as patch:
            if not can_exchange:
                patch.setattr(staging, "exchange", lambda one, other: False)
            done = kill_at(patch, step)
            try:
                prepare(options(source, target, overwrite=True, max_shard_size=10**9)).run()
                break
            except Killed:
                pass
        if can_exchange or done != ["exchange", "rename"]:
            assert snapshot(target) == before or assert_equal(target, dcp_source) is None
        outcome = prepare(options(source, target, overwrite=True, resume=resume, max_shard_size=10**9)).run()
        assert_equal(target, dcp_source)
        assert sorted(path.name for path in home.iterdir()) == ["out"]
        assert {path.name for path in target.iterdir()} == set(outcome.files)
    assert "unlink" in done
    assert ("exchange" in done) or ("rename" in done)
    assert step > 3, "publish was never killed"


def test_fsync_has_everything_on_the_disk_before_what_was_there_goes(source, target, monkeypatch):
    synced, rmtree = {}, shutil.rmtree
    real = os.fsync

    def fsync(descriptor):
        synced.setdefault(os.fstat(descriptor).st_ino, len(synced))
        real(descriptor)

    def remove(path, *arguments, **more):
        assert {path.stat().st_ino for path in [target, target.parent, *files()]} <= synced.keys()
        rmtree(path, *arguments, **more)
        synced[0] = len(synced)

    def files():
        own = (".reshard.json", "lock", "done-0.jsonl")
        return [path for path in target.iterdir() if path.name not in own]

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(shutil, "rmtree", remove)
    prepare(options(source, target, overwrite=True, fsync=True)).run()
    assert 0 in synced, "nothing was replaced"
    assert {path.name for path in files()} >= {".metadata", "config.json", "__0_0.distcp"}
    order = {path.name: synced[path.stat().st_ino] for path in [*files(), target, target.parent]}
    assert max(order, key=order.__getitem__) == target.parent.name
    made = target.parent / "a" / "b" / "out"
    prepare(options(source, made, fsync=True)).run()
    assert {path.stat().st_ino for path in (made, *list(made.parents)[:3])} <= synced.keys()


def test_old_beside_a_whole_target_is_removed(source, dcp_source, target):
    shutil.copytree(source, target.parent / ".out.old")
    prepare(options(source, target, overwrite=True)).run()
    assert_equal(target, dcp_source)
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_old_beside_a_damaged_target_is_kept(source, target):
    shutil.copytree(source, target.parent / ".out.old")
    os.truncate(next(target.glob("*.safetensors")), 10)
    with pytest.raises(BridgeError, match=r"\.out\.old is left from .* not whole .*remove one"):
        prepare(options(source, target, overwrite=True)).run()
    assert snapshot(target.parent / ".out.old") == snapshot(source)


def test_a_mount_point_and_the_working_directory_are_refused_before_anything_is_written(
    source, tmp_path, monkeypatch, capsys
):
    with pytest.raises(BridgeError, match="/proc is a mount point"):
        prepare(options(source, Path("/proc")))
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for name in (".", "..", str(tmp_path / "here" / "below")):
        assert main(["reshard", str(source), name, "--to", "dcp"]) == 2
        assert "is where you are" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "below"]
    prepare(options(source, Path("out"))).run()
    assert (tmp_path / "here" / "below" / "out" / ".metadata").is_file()


def test_a_directory_that_may_not_be_written_is_refused_before_anything_is_written():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        user = os.geteuid()
        if not user:
            os.seteuid(65534)
        try:
            with pytest.raises(BridgeError, match=f"since {folder} cannot be written to"):
                Staging(Path(folder) / "new" / "out").check(overwrite=False)
        finally:
            os.seteuid(user)


def test_a_file_of_the_users_in_the_target_is_no_sign_of_ours(source, target, monkeypatch):
    (target / "plan.json").write_text("what `titan-bridge plan --json` printed")
    before = snapshot(target)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            prepare(options(source, target, overwrite=True)).run()
    with pytest.raises(BridgeError, match="other options"):
        prepare(options(source, target, overwrite=True, resume=True, dtype=torch.bfloat16)).run()
    assert snapshot(target) == before
    assert prepare(options(source, target, overwrite=True, resume=True)).run().resumed_parts == 2
