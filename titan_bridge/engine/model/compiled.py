"""What a compiled step on disk depends on besides what vLLM knows.

vLLM keeps a compiled step under a name made from its own config and loads it at later starts without a look at the
model (guards are off). The files that were traced are compared with those of today; the code that built the model, and
what it found on this machine and in the checkpoint, are not. They go into the name here.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch._inductor.cpu_vec_isa import pick_vec_isa
from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform

import titan_bridge
import titan_bridge.parallelize
from titan_bridge import cpu
from titan_bridge.engine.model.build import Setup
from titan_bridge.models import Family
from titan_bridge.versions import installed

KEY = "titan_step"
"""In `additional_config`, which is part of the name; set by each worker for itself."""


def name_compiled_step(vllm_config: VllmConfig, setup: Setup, stage: int = 0) -> None:
    """Let the name of this worker's compiled step say what `setup`, its stage and the code that executes it are.

    Nothing where nothing is compiled, or where `additional_config` is an object that hashes itself.
    """
    given = vllm_config.additional_config
    if vllm_config.compilation_config.mode == CompilationMode.NONE or not isinstance(given, Mapping):
        return
    ours = {
        key: value for key, value in given.get("titan", {}).items() if key != "step"
    }  # all steps compute alike
    vllm_config.additional_config = {**given, "titan": ours, KEY: _digest(setup, stage)}


def _digest(setup: Setup, stage: int = 0) -> str:
    facts = {
        "hf": setup.hf,  # vLLM's name has the directory; its files may have changed
        "sizes": repr(setup.sizes),
        "stage": stage,
        "expert_bias": setup.expert_bias,
        "torchtitan": installed("torchtitan"),
        # The loops of a compiled step are as wide as the vectors of the machine that compiled it.
        "device": repr(current_platform.get_device_capability()),
        "vectors": str(pick_vec_isa()) if current_platform.is_cpu() else None,
        # Which all-reduce was traced: see patches.wait_without_spinning.
        "gloo": cpu.shares_cores(os.environ),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for path in _sources(setup.family):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(family: Family) -> Iterator[Path]:
    """Our source files and those of the package that brings the family."""
    module = sys.modules[type(family).__module__]
    for package in (titan_bridge, titan_bridge.parallelize, sys.modules[module.__name__.partition(".")[0]]):
        assert package.__file__ is not None
        file = Path(package.__file__)
        yield from sorted(file.parent.rglob("*.py")) if hasattr(package, "__path__") else [file]
