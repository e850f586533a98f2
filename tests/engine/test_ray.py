"""What a worker in a Ray actor knows of us: it has the environment that vLLM copies and what is pickled for it.

vLLM has no Ray executor for CPUs, so none is started. Both of its executors make a `WorkerWrapperBase` in an actor,
carry the driver's environment over and hand it the pickled config; this does the same with a process of its own.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

ACTOR = """
import json, pickle, sys
from pathlib import Path
from vllm.v1.worker.worker_base import WorkerWrapperBase

kwargs = pickle.loads(Path(sys.argv[1]).read_bytes())
wrapper = WorkerWrapperBase(rpc_rank=0, global_rank=0)
wrapper.init_worker([kwargs])
config = wrapper.vllm_config
model, _ = config.model_config.registry.resolve_model_cls(config.model_config.architectures, config.model_config)
extension = config.parallel_config.worker_extension_cls.rpartition(".")[2]
names = [base.__name__ for base in type(wrapper.worker).__mro__]
print(json.dumps({
    "model": f"{model.__module__}.{model.__qualname__}",
    "reports": extension in names and hasattr(wrapper, "bridge_report"),
    "load_format": config.load_config.load_format,
}))
"""


def test_a_worker_of_rays_has_our_class_and_our_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.ray.ray_env import get_env_vars_to_copy
    from vllm.v1.executor.ray_env_utils import get_driver_env_vars

    from titan_bridge.engine.run.worker import WORKER_EXTENSION

    model = make_checkpoint(tmp_path / "model", "qwen3", tokenizer=False)
    config = EngineArgs(
        model=str(model),
        model_impl="torchtitan",
        skip_tokenizer_init=True,
        worker_extension_cls=WORKER_EXTENSION,
    ).create_engine_config()
    kwargs = {
        "vllm_config": config,
        "local_rank": 0,
        "rank": 0,
        "distributed_init_method": "tcp://127.0.0.1:1",
        "is_driver_worker": True,
    }
    (tmp_path / "kwargs").write_bytes(pickle.dumps(kwargs))
    monkeypatch.setenv("VLLM_PLUGINS", "titan_bridge")
    copied = get_env_vars_to_copy(additional_vars=set(current_platform.additional_env_vars))
    assert "VLLM_PLUGINS" in copied
    assert "VLLM_PLUGINS" in get_driver_env_vars(set())
    shipped = {name: os.environ[name] for name in copied if name in os.environ}
    bare = {name: os.environ[name] for name in ("PATH", "HOME", "LD_PRELOAD") if name in os.environ}
    found = subprocess.run(
        [sys.executable, "-c", ACTOR, str(tmp_path / "kwargs")],
        env={**bare, **shipped}, cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    assert json.loads(found.stdout.splitlines()[-1]) == {
        "model": "titan_bridge.engine.model.wrapper.TitanForCausalLM",
        "reports": True,
        "load_format": config.load_config.load_format,
    }
    assert config.load_config.load_format == "titan"


def test_vllm_has_no_ray_for_cpus() -> None:
    """Once this fails, the test above can start the real executor."""
    from vllm.platforms.cpu import CpuPlatform

    assert not CpuPlatform.ray_device_key
