"""`scripts/gpu_check.sh` itself, with parts that a CPU can run; what it says about GPUs only a GPU can show."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The file as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts/gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def test_a_mean_of_zero_is_within_what_is_allowed(script) -> None:
    assert script.within(0.0, 1e-3)
    assert not any(script.within(mean, 1e-3) for mean in (None, float("nan"), 2e-3))


def check(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts/gpu_check.sh"), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((out / "report.json").read_text())["rows"]}


def test_parts_run_and_are_told_apart(tmp_path: Path, no_orphans: None) -> None:
    parts = ("doctor", "operators", "fp32-qwen3_moe", "sleep")
    done = check("--device", "cpu", "--out", str(tmp_path), "--only", *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path)
    assert {name: row["result"] for name, row in found.items()} == {
        "doctor": "PASS",
        "operators": "PASS",
        "fp32-qwen3_moe": "PASS",
        "sleep": "SKIP",
    }
    assert 0 < found["fp32-qwen3_moe"]["mean"] < found["fp32-qwen3_moe"]["max"] <= 1e-4
    assert 0 < found["operators"]["max"] < 0.03
    assert "a CPU: no word about GPUs" in done.stdout
    about = json.loads((tmp_path / "report.json").read_text())["about"]
    assert about["gpus"] == []
    assert about["versions"]["torch"].startswith("2.13")
    assert not {os.uname().nodename, str(Path.home())} & set(json.dumps(about).split('"'))


def test_a_part_that_fails_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--out", str(tmp_path), "--only", "doctor", "sleep")
    done = check(*options, VLLM_PLUGINS="another")
    assert done.returncode == 1
    found = rows(tmp_path)
    assert (found["doctor"]["result"], found["sleep"]["result"]) == ("FAIL", "SKIP")
    assert found["doctor"]["why"].startswith("exit code 1: ")
    assert "VLLM_PLUGINS" in (tmp_path / "logs/doctor.log").read_text()


def test_a_part_that_hangs_is_ended(script: ModuleType, tmp_path: Path, no_orphans: None) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    slow = script.Check(name="slow", command=("-c", code), on_cpu=True, seconds=1)
    given = type("Given", (), {"device": "cpu", "out": tmp_path})
    row = script.run(slow, given, [], tmp_path / "log")
    assert (row["result"], row["why"]) == ("FAIL", "not done after 1 s")


def test_another_class_or_a_large_difference_fails(script: ModuleType, tmp_path: Path) -> None:
    given = type("Given", (), {"device": "cpu", "out": tmp_path})

    def result(model_class: str, mean: float) -> str:
        said = json.dumps({"model_class": model_class, "references": [{"max": 1.0, "mean": mean}]})
        part = script.Check(name="a", command=("-c", f"print('''{said}''')".replace("{", "{{").replace("}", "}}")),
                            on_cpu=True, mean=0.2)  # fmt: skip
        return script.run(part, given, [], tmp_path / "log")["result"]

    assert result("titan_bridge.engine.model.wrapper.TitanForCausalLM", 0.1) == "PASS"
    assert result("titan_bridge.engine.model.wrapper.TitanForCausalLM", 0.3) == "FAIL"
    assert result("vllm.model_executor.models.qwen3.Qwen3ForCausalLM", 0.1) == "FAIL"


def test_without_a_gpu_it_says_so() -> None:
    done = check()
    assert done.returncode == 2
    assert done.stderr == "gpu_check: nvidia-smi finds no GPU; --device cpu runs what a CPU can\n"
