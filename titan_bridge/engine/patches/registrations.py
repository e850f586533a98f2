"""What vLLM has a place for, so that nothing of it is replaced; and the check that all of ours is in force."""

from __future__ import annotations

import importlib
from typing import Any

from titan_bridge.engine.options import TRANSFER_BACKEND, titan_options
from titan_bridge.engine.patches import apply

ARCHITECTURE = "TitanForCausalLM"
"""Name under which our class stands in vLLM's model registry."""
MODEL_CLASS = "titan_bridge.engine.model.wrapper:TitanForCausalLM"
PREFLIGHT_MODULE = "titan_bridge.engine.preflight"
TRANSFER_MODULE = "titan_bridge.engine.transfer"


def register_model() -> None:
    """Make our class known to vLLM's model registry, by its public function."""
    models = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry
    if ARCHITECTURE not in models.models:
        models.register_model(ARCHITECTURE, MODEL_CLASS)


def check_config_early() -> None:
    """Check model, sizes and options in the process the user talks to, before any worker starts.

    What: enters our class in `MODELS_CONFIG_MAP`, vLLM's own table of per-architecture configuration hooks
    (an entry of ours, nothing of vLLM's is replaced). Why: an error in a worker reaches the user as "Engine
    core initialization failed". Version: vllm 0.32 (`vllm/model_executor/models/config.py`). Delete when: the
    table gets a public registration function.
    """
    config = importlib.import_module("vllm.model_executor.models.config")
    if ARCHITECTURE in config.MODELS_CONFIG_MAP:
        return

    class Preflight(config.VerifyAndUpdateConfig):  # type: ignore[misc, name-defined]
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if vllm_config.parallel_config.pipeline_parallel_size > 1:
                require_stages()
            importlib.import_module(PREFLIGHT_MODULE).check(vllm_config)  # late: it imports torchtitan

    config.MODELS_CONFIG_MAP[ARCHITECTURE] = Preflight


def register_weight_transfer() -> None:
    """Make `weight_transfer_config={"backend": "titan"}` known, on the engine's and on the trainer's side.

    Nothing of vLLM's is replaced: both factories have a public registration, and take the names of classes that are
    imported when they are asked for.
    """
    factory = importlib.import_module("vllm.distributed.weight_transfer.factory")
    for registry, name in (
        (factory.WeightTransferEngineFactory, "TitanWeightTransferEngine"),
        (factory.WeightTransferTrainerFactory, "TitanTrainerWeightTransferEngine"),
    ):
        if TRANSFER_BACKEND not in registry._registry:  # the factories raise on a second registration
            registry.register_engine(TRANSFER_BACKEND, TRANSFER_MODULE, name)


def read_any_checkpoint() -> None:
    """Make vLLM's load format "titan" known where models are loaded.

    What: imports `titan_bridge.engine.loading.model_loader`, which registers with vLLM's `register_model_loader`, right
    after vLLM imports its own loaders; nothing of vLLM's is replaced. Why: importing them here would cost every
    vLLM process most of a second, and a plugin has no later moment in a worker. Version: vllm 0.32
    (`vllm/model_executor/model_loader/__init__.py`). Delete when: loaders can be registered by name
    ("module:class"), as models can.
    """
    apply.after_import("vllm.model_executor.model_loader", _register_loader)


def _register_loader() -> None:
    importlib.import_module("titan_bridge.engine.loading.model_loader")


REGISTRATIONS = (register_model, check_config_early, register_weight_transfer, read_any_checkpoint)
"""Each may be called again."""


def require() -> None:
    """Check that everything of `install` is in force, and that all patches know their targets.

    Called wherever torchtitan, weight transfer "titan" or `attach_specs` is asked for.

    Raises:
        BridgeError: a target that is not there or takes other parameters, or a registration that fails.
    """
    found = apply.problems()
    for register in REGISTRATIONS:
        try:
            register()
        except Exception as error:
            found["vllm"] = f"{register.__name__}: {error}"
    if found:
        raise apply.refusal(found)
    apply.apply("start")


def require_stages() -> None:
    """`require`, for what pipeline stages need besides.

    Raises:
        BridgeError: as there.
    """
    if found := apply.problems(stages=True):
        raise apply.refusal(found)


def wanted(model_impl: str, additional_config: Any, weight_transfer_config: Any) -> bool:
    """Whether options of vLLM's ask for anything of ours."""
    backend = getattr(weight_transfer_config, "backend", None)
    specs = titan_options(additional_config).attach_specs
    return model_impl == "torchtitan" or backend == TRANSFER_BACKEND or specs


def current_config() -> Any:
    """vLLM's config of the model that is being built here; None where there is none."""
    return importlib.import_module("vllm.config").get_current_vllm_config_or_none()


def ours_is_built() -> bool:
    """Whether this process builds, or is about to build, a model for `model_impl="torchtitan"`."""
    return getattr(getattr(current_config(), "model_config", None), "model_impl", None) == "torchtitan"
