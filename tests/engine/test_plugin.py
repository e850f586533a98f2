"""The plugin inside vLLM: quick, idempotent, and silent unless `model_impl="torchtitan"` is asked for.

No engine starts here: a class is resolved and a config checked where vLLM itself does it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from titan_bridge import cpu
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(200)]


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_checkpoint(folder / name, name) for name in ("qwen3", "qwen3_moe")}


REGISTER = """
import json, sys, time
import vllm.model_executor.models.registry, vllm.model_executor.models.config
before = set(sys.modules)
started = time.perf_counter()
from titan_bridge.engine.plugin import register
register()
seconds = time.perf_counter() - started
from vllm.model_executor.models.registry import _ModelRegistry
patched = _ModelRegistry.inspect_model_cls, _ModelRegistry.resolve_model_cls
register()
same = patched == (_ModelRegistry.inspect_model_cls, _ModelRegistry.resolve_model_cls)
heavy = sorted(m for m in sys.modules.keys() - before if m.split(".")[0] in ("torchtitan", "transformers"))
print(json.dumps({"seconds": seconds, "same": same, "heavy": heavy}))
"""


def test_registration_is_quick_and_idempotent_and_leaves_torchtitan_out() -> None:
    done = run(REGISTER)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    print(f"register() took {facts['seconds'] * 1000:.1f} ms")
    assert facts["same"]
    assert facts["heavy"] == []


RESOLVE = """
import json, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.engine.arg_utils import EngineArgs
found = []
for impl in json.loads(sys.argv[2]):
    config = EngineArgs(model=sys.argv[1], model_impl=impl).create_model_config()
    model_class, architecture = config.registry.resolve_model_cls(config.architectures, config)
    found.append([model_class.__module__, model_class.__name__, config.architecture])
print(json.dumps(found))
"""


def resolving(model: Path, *impls: str) -> str:
    """A program that prints module, class and architecture for each `model_impl`."""
    return RESOLVE.replace("sys.argv[1]", repr(str(model))).replace("sys.argv[2]", repr(json.dumps(impls)))


def resolve(model: Path, *impls: str, **variables: str) -> list[list[str]]:
    done = run(resolving(model, *impls), **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_any_other_model_impl_is_as_without_the_plugin(models: dict[str, Path]) -> None:
    others = ("auto", "vllm", "transformers")
    with_plugin = resolve(models["qwen3"], *others)
    assert with_plugin == resolve(models["qwen3"], *others, VLLM_PLUGINS="none")
    assert [found[0].partition(".")[0] for found in with_plugin] == ["vllm"] * 3


def test_torchtitan_resolves_to_our_class(models: dict[str, Path]) -> None:
    assert resolve(models["qwen3_moe"], "torchtitan") == [
        ["titan_bridge.engine.model.wrapper", "TitanForCausalLM", "TitanForCausalLM"]
    ]


WRONG_VERSION = """
from titan_bridge import versions
versions.SUPPORTED["torchtitan"] = "0.9"
"""


def test_wrong_versions_refuse_torchtitan_and_nothing_else(models: dict[str, Path]) -> None:
    for impl, refused in (("torchtitan", True), ("auto", False)):
        done = run(WRONG_VERSION + resolving(models["qwen3"], impl))
        line = "titan_bridge does not support torchtitan 0.3.0; install 'torchtitan==0.9.*'"
        assert (line in done.stderr) == refused
        assert (done.returncode != 0) == refused


CORES = """
import json, os, sys
from vllm.engine.arg_utils import EngineArgs
from titan_bridge import cpu
found = []
for tp, impl in ((2, "vllm"), (1, "torchtitan"), (2, "torchtitan"), (4, "torchtitan")):
    EngineArgs(model=sys.argv[1], model_impl=impl, tensor_parallel_size=tp).create_model_config()
    found.append(os.environ.get(cpu.BIND))
os.environ[cpu.BIND] = "nobind"
EngineArgs(model=sys.argv[1], model_impl="torchtitan", tensor_parallel_size=2).create_model_config()
print(json.dumps([*found, os.environ[cpu.BIND]]))
"""


def test_workers_of_torchtitans_model_are_bound_where_the_user_has_not_said_how(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cpu.BIND, raising=False)
    done = run(CORES.replace("sys.argv[1]", repr(str(models["qwen3"]))))
    assert done.returncode == 0, done.stderr
    two, four = (cpu.bind(workers, cpu.cores()) for workers in (2, 4))
    assert json.loads(done.stdout.splitlines()[-1]) == [None, None, two, four, "nobind"]
