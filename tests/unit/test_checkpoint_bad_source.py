"""A source that does not fit: an error of ours that names what is wrong, before anything is written."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.unit.checkpoint_samples import NORM, changed, contents, options
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.cli import main
from titan_bridge.errors import BridgeError

DENSE = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize("kind", ["hf", "dcp"])
def test_a_truncated_file_is_refused_before_anything_is_written(source, dcp_source, tmp_path, kind):
    copy = tmp_path / "copy"
    shutil.copytree(source if kind == "hf" else dcp_source, copy)
    file = sorted(copy.glob("*.safetensors" if kind == "hf" else "*.distcp"))[1]
    for size in (file.stat().st_size - 1, 100, 5, 0):
        os.truncate(file, size)
        with pytest.raises(BridgeError, match=file.name):
            prepare(options(copy, tmp_path / "out", to="dcp" if kind == "hf" else "hf"))
    file.unlink()
    with pytest.raises(BridgeError, match=file.name):
        prepare(options(copy, tmp_path / "out", to="dcp" if kind == "hf" else "hf"))
    assert not (tmp_path / "out").exists()


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
def test_tensors_that_do_not_fit_are_named(source, tmp_path, change, message):
    copy = changed(source, tmp_path / "copy", change)
    with pytest.raises(BridgeError, match=message):
        prepare(options(copy, tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {"app": {"net": state}},
            r"missing: tok_embeddings.weight.*\.metadata has tensors under other names: app\.net\.tok_embeddings",
        ),
        (lambda state: {f"module.{name}": value for name, value in state.items()}, r"unexpected: module\.tok_emb"),
        (
            lambda state: {name: value.to(torch.float8_e4m3fn) for name, value in state.items()},
            "dtype torch.float8_e4m3fn; quantized weights are not read",
        ),
    ],
)  # fmt: skip
def test_a_dcp_of_other_names_or_of_float8_is_refused_by_what_it_has(dcp_source, tmp_path, change, message):
    dcp.save(change(contents(dcp_source)), checkpoint_id=tmp_path / "other", no_dist=True)
    shutil.copy(dcp_source / "config.json", tmp_path / "other")
    with pytest.raises(BridgeError, match=message):
        prepare(options(tmp_path / "other", tmp_path / "out", to="hf"))


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


def test_nan_makes_the_exit_code_1(source, tmp_path, capsys):
    copy = changed(source, tmp_path / "nan", lambda state: state[NORM].fill_(float("nan")))
    arguments = ["reshard", str(copy), str(tmp_path / "x"), "--to", "dcp"]
    assert main(arguments) == 1
    assert "32 weights are NaN: norm.weight (32)" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--allow-nan"]) == 0


QUANTIZED = {
    "names": ({}, lambda state: state.update({f"{DENSE}_scale_inv": torch.ones(1, 1)}), f"{DENSE}_scale_inv"),
    "dtype": ({}, lambda state: state.update({DENSE: state[DENSE].to(torch.float8_e4m3fn)}), DENSE),
}


@pytest.mark.parametrize("case", QUANTIZED)
@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_dtype_of_a_quantized_checkpoint_is_refused_by_name(source, tmp_path, case, to):
    config, change, named = QUANTIZED[case]
    copy = changed(source, tmp_path / "copy", change)
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | config))
    with pytest.raises(BridgeError, match=rf"--dtype: .*{re.escape(named)}.* quantized"):
        prepare(options(copy, tmp_path / "out", to=to, dtype=torch.bfloat16))
    prepare(options(copy, tmp_path / "out", to="hf")).run()  # as it is, it may be carried
    assert contents(tmp_path / "out").keys() == contents(copy).keys()


def test_what_a_cast_makes_infinite_is_told_from_what_was(source, tmp_path, capsys):
    def change(state):
        state[NORM][:3] = 1e5
        state[NORM][3] = -torch.inf
        state[NORM][4] = torch.nan
        state["lm_head.weight"][5, :2] = -7e4

    copy = changed(source, tmp_path / "big", change)
    arguments = ["reshard", str(copy), str(tmp_path / "x"), "--to", "dcp", "--overwrite"]
    assert main([*arguments, "--dtype", "float16", "--json"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["overflow"] == {"norm.weight": 3, "lm_head.weight": 2}
    assert report["inf"] == {"norm.weight": 4, "lm_head.weight": 2}
    assert report["nan"] == {"norm.weight": 1}
    assert "5 elements became infinite as float16, first in norm.weight (3)" in printed.err
    assert "1 weights are infinite: norm.weight (1); they were copied as they are" in printed.err
    assert main([*arguments, "--dtype", "bfloat16", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["overflow"] == {}
