"""`--verify` holds the source's bytes, too, against the checksums that it has, and says so."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.unit.checkpoint_samples import contents, options
from titan_bridge.checkpoint import open_checkpoint
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.cli import main
from titan_bridge.errors import BridgeError


@pytest.fixture
def written_by_torch(source, tmp_path, monkeypatch):
    """Makes a DCP directory with the model's tensors, written by torch."""

    def make(name: str, *, checksums: bool = True):
        prepare(options(source, tmp_path / "ours", overwrite=True)).run()
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(checksums)
        try:
            dcp.save(contents(tmp_path / "ours"), checkpoint_id=tmp_path / name, no_dist=True)
        finally:
            torch.serialization.set_crc32_options(before)
        shutil.copy(source / "config.json", tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("to", ["dcp", "hf"])
@pytest.mark.parametrize("writer", ["torch", "ours"])
def test_one_flipped_byte_of_a_dcp_payload_is_found(dcp_source, written_by_torch, tmp_path, writer, to):
    copy = tmp_path / "copy"
    shutil.copytree(dcp_source if writer == "ours" else written_by_torch("dcp"), copy)
    with open_checkpoint(copy) as checkpoint:
        stored = checkpoint.tensors["tok_embeddings.weight"]
        path, start = stored.chunks[0].path, checkpoint.locate(stored, stored.chunks[0])
    data = bytearray(path.read_bytes())
    data[start + 3] ^= 0x40  # the exponent of the first element
    path.write_bytes(data)
    with pytest.raises(BridgeError, match=rf"{path.name}: tok_embeddings\.weight: .* CRC-32"):
        prepare(options(copy, tmp_path / "out", to=to, verify=True)).run()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists(), "it was found after something was written"


def test_the_report_says_whether_the_source_was_checked(source, written_by_torch, tmp_path, capsys):
    cases = {
        "dcp": (written_by_torch("dcp"), ["--verify"], True, "source checked"),
        "hf": (source, ["--verify"], False, "source not checked: it has no checksums"),
        "without": (written_by_torch("bare", checksums=False), ["--verify"], False, "source not checked"),
        "unasked": (source, [], False, None),
    }
    for name, (path, more, checked, text) in cases.items():
        arguments = ["reshard", str(path), str(tmp_path / "out" / name), "--to", "dcp", *more]
        assert main([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["source_checked"] is checked
        assert main([*arguments, "--overwrite"]) == 0
        printed = capsys.readouterr().out
        assert (text in printed) if text else ("checked" not in printed)
        assert contents(tmp_path / "out" / name).keys() == contents(tmp_path / "ours").keys()
