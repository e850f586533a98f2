"""A target that may not be written, or was not written as it should be."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import shutil
import zlib

import pytest

from tests.unit.checkpoint_samples import Killed, assert_equal, contents, options, snapshot, stop_after
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.checkpoint.staging import PART, Staging
from titan_bridge.checkpoint.verify import is_as_written
from titan_bridge.cli import main
from titan_bridge.errors import BridgeError
from titan_bridge.ports import free_port
from titan_bridge.testing import make_checkpoint


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
    with pytest.raises(BridgeError, match=rf"process {os.getpid()} on .* is writing"):
        job.run()
    staging.close()
    job.run()


def test_a_disk_without_file_locks_is_no_other_process(source, tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        BridgeError, match=r"lock cannot be locked \(No locks available\): .* DST on another one"
    ):
        prepare(options(source, tmp_path / "out")).run()


@pytest.mark.parametrize("published", [False, True])
def test_a_lock_on_a_file_that_is_gone_keeps_nobody_out(tmp_path, monkeypatch, published):
    """The run before removes the lock, or publishes the directory with it, after this one has opened the file."""
    first, flock = Staging(tmp_path / "out"), fcntl.flock

    def late(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        if published:
            shutil.rmtree(first.path)
        else:
            (first.path / "lock").unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    first.begin("one", resume=False)
    with pytest.raises(BridgeError, match="is writing"):
        Staging(tmp_path / "out").begin("other", resume=False)
    first.close()


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
        file = self.path / (result.file + PART)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        real(self, result, rank, fsync=fsync)

    monkeypatch.setattr(Staging, "finish", flip)
    with pytest.raises(BridgeError, match="is not what was written"):
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
    assert len(results) > 1
    for result in results:
        file = tmp_path / "out" / result.file
        assert is_as_written(file, result.crc)
        assert result.crc == zlib.crc32(file.read_bytes())


def test_the_command_line_prints_one_line_and_exits_with_2(source, tmp_path, capsys):
    assert main(["reshard", str(source), str(source), "--to", "dcp"]) == 2
    assert main(["reshard", str(tmp_path), str(tmp_path / "x"), "--to", "dcp"]) == 2
    assert (
        main(["reshard", str(source), str(tmp_path / "x"), "--to", "dcp", "--max-shard-size", "5 apples"])
        == 2
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 3
    assert "'5 apples' is not a size" in err


def test_dry_run_says_what_would_happen_and_writes_nothing(source, tmp_path, capsys):
    arguments = [
        "reshard",
        str(source),
        str(tmp_path / "x"),
        "--to",
        "dcp",
        "--json",
    ]
    assert main([*arguments, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert main(arguments) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["bytes_written"] == planned["bytes_to_write"]
    assert done["bytes_read"] == planned["bytes_to_read"] == sum(t.nbytes for t in contents(source).values())
    for file in planned["target"]["files"]:
        assert (tmp_path / "x" / file["name"]).stat().st_size == file["bytes"]


def test_the_last_line_says_what_to_type_next(source, tmp_path, capsys):
    def last(*arguments: str) -> str:
        assert main(["reshard", *arguments]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    spaced = tmp_path / "a b"
    assert last(str(source), str(spaced), "--to", "hf") == f"next: titan-bridge serve '{spaced}'"
    (spaced / "config.json").unlink()
    bare = str(tmp_path / "bare")
    assert last(str(spaced), bare, "--to", "hf").startswith(
        f"next: put the model's config.json into {bare}, then "
    )
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["Unknown"]}
    (spaced / "config.json").write_text(json.dumps(config))
    assert "is not served" in last(str(spaced), str(tmp_path / "other"), "--to", "hf")


def test_the_next_command_is_understood(tmp_path, capsys):
    """What is said after a conversion passes the checks of the command that it names."""
    source = make_checkpoint(tmp_path / "source", "qwen3_moe", tokenizer=False)
    assert main(["reshard", str(source), str(tmp_path / "x"), "--to", "dcp"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: titan-bridge "))
    assert main([*command, "--port", str(free_port()), "--dry-run"]) == 0
