"""`--resume` keeps a file only if it is what was written, by its checksums; everything else is written again."""

from __future__ import annotations

import json
import os

import pytest

from tests.unit.checkpoint_samples import SMALL, Killed, assert_equal, options, stop_after
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.checkpoint.staging import PART, Staging
from titan_bridge.cli import main
from titan_bridge.errors import BridgeError
from titan_bridge.testing import make_checkpoint


@pytest.fixture
def stopped(source, tmp_path, monkeypatch):
    """A run that was killed after three parts: its target and its staging directory."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            prepare(options(source, tmp_path / "out")).run()
    return tmp_path / "out", Staging(tmp_path / "out").path


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_part_that_verify_found_bad_is_written_again(source, dcp_source, tmp_path, monkeypatch):
    target = tmp_path / "out"
    real = Staging.finish

    def damage(self, result, rank, *, fsync):
        if result.file == "__0_1.distcp":
            flip(self.path / ("__0_1.distcp" + PART))
        real(self, result, rank, fsync=fsync)

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "finish", damage)
        with pytest.raises(BridgeError, match=r"__0_1\.distcp.* not what was written.*--resume"):
            prepare(options(source, target, verify=True)).run()
    parts = len(prepare(options(source, target)).target.files)
    assert prepare(options(source, target, resume=True)).run().resumed_parts == parts - 1
    assert_equal(target, dcp_source)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: os.truncate(path, 100),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        os.unlink,
    ],
    ids=["flipped", "truncated", "longer", "gone"],
)
def test_a_damaged_part_is_written_again(source, dcp_source, stopped, damage):
    target, staging = stopped
    damage(sorted(staging.glob("*.distcp"))[0])
    assert prepare(options(source, target, resume=True)).run().resumed_parts == 2
    assert_equal(target, dcp_source)


def json_lines(change):
    """A journal whose first line says something else."""

    def damage(journal):
        first, *rest = filter(None, journal.read_bytes().splitlines())
        head, brace, text = first.partition(b"{")
        data = json.loads(brace + text)
        change(data)
        journal.write_bytes(b"\n".join([head + json.dumps(data).encode(), *rest]) + b"\n")

    return damage


JOURNALS = {
    "no UTF-8": lambda journal: journal.write_bytes(b"\xff\xfe\n" + journal.read_bytes()),
    "another kind of value": lambda journal: journal.write_bytes(
        b'[1]\n"x"\n7\nnull\n' + journal.read_bytes()
    ),
    "nested deeply": lambda journal: journal.write_bytes(b"[" * 100_000 + b"\n" + journal.read_bytes()),
    "a number of many digits": lambda journal: journal.write_bytes(
        b"9" * 9000 + b"\n" + journal.read_bytes()
    ),
    "nan is a list": json_lines(lambda data: data.update(nan=[1])),
    "the CRC is a list": json_lines(lambda data: data.update(crc=[1, 2])),
    "another CRC": json_lines(lambda data: data.update(crc=data["crc"] ^ 1)),
    "no file": json_lines(lambda data: data.pop("file")),
    "cut off": lambda journal: os.truncate(journal, journal.stat().st_size - 20),
    "empty": lambda journal: os.truncate(journal, 0),
}


@pytest.mark.parametrize("damage", JOURNALS.values(), ids=JOURNALS)
def test_a_damaged_journal_is_no_reason_to_publish_or_to_fail(source, dcp_source, stopped, damage):
    target, staging = stopped
    damage(staging / "done-0.jsonl")
    assert prepare(options(source, target, resume=True)).run().resumed_parts <= 3
    assert_equal(target, dcp_source)


def test_what_is_written_after_a_line_that_is_cut_off_counts(source, stopped, monkeypatch):
    target, staging = stopped
    journal = staging / "done-0.jsonl"
    os.truncate(journal, journal.stat().st_size - 20)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            prepare(options(source, target, resume=True)).run()
    assert prepare(options(source, target, resume=True)).run().resumed_parts == 2 + 2


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"digest": 3}'])
def test_a_damaged_plan_is_refused_in_one_line_or_begun_anew(source, dcp_source, stopped, text, capsys):
    target, staging = stopped
    (staging / ".reshard.json").write_bytes(text)
    arguments = ["reshard", str(source), str(target), "--to", "dcp", "--max-shard-size", "40KB"]
    assert main([*arguments, "--resume"]) == 2
    assert "run without --resume" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert main(arguments) == 0
    assert_equal(target, dcp_source)


def test_resume_notices_another_config(tmp_path, monkeypatch):
    """Other heads of the same total: all shapes are the same, but the rows of q and k go elsewhere."""
    model = make_checkpoint(tmp_path / "hf", "llama3", max_shard_size="60KB", tokenizer=False, **SMALL)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            prepare(options(model, tmp_path / "out")).run()
    config = json.loads((model / "config.json").read_text())
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BridgeError, match="another source, other options"):
        prepare(options(model, tmp_path / "out", resume=True)).run()
