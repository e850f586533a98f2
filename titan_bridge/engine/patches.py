"""Every change we make to somebody else's code, one function a patch.

Each says what it changes, why, for which version, and when it can be deleted; each checks that its target
looks as expected and refuses otherwise. Nothing else in the project patches anything.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import os
import sys
import uuid
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from titan_bridge import cpu
from titan_bridge.checks import model_directory, rope_covers
from titan_bridge.engine import forking
from titan_bridge.engine.options import titan_options
from titan_bridge.engine.plugin import (
    ARCHITECTURE,
    MODEL_CLASS,
    PREFLIGHT_MODULE,
    TRANSFER_BACKEND,
    TRANSFER_MODULE,
)
from titan_bridge.engine.specs import LAYOUT, NATIVE, VERIFY
from titan_bridge.errors import BridgeError
from titan_bridge.versions import unsupported

MARK = "_titan_bridge_patch"
"""Attribute on a replaced function: a target that carries it is never wrapped twice."""

SPEC_METHODS = (LAYOUT, NATIVE, VERIFY)


def install() -> None:
    """Apply the patches that `model_impl="torchtitan"` needs in every vLLM process."""
    registry = importlib.import_module("vllm.model_executor.models.registry")
    if ARCHITECTURE not in registry.ModelRegistry.models:
        registry.ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
    route_model_impl(registry)
    check_config_early()
    read_any_checkpoint()
    wait_without_spinning()
    complete_model_config()
    read_all_replies()
    reload_any_checkpoint()
    register_weight_transfer()
    fork_processes()


def route_model_impl(registry: Any) -> None:
    """Make `model_impl="torchtitan"` resolve to our class.

    What: wraps `_ModelRegistry.inspect_model_cls` and `resolve_model_cls`. Why: `ModelConfig.model_impl` takes
    any string, but the registry knows only its own four and serves vLLM's own model for all others without a
    word. Version: vllm 0.32 (`vllm/model_executor/models/registry.py`). Delete when: vLLM lets a plugin
    register a model implementation by name.
    """
    for name, result in (
        ("inspect_model_cls", "_try_inspect_model_cls"),
        ("resolve_model_cls", "_try_load_model_cls"),
    ):
        _wrap(registry._ModelRegistry, name, ["self", "architectures", "model_config"], _route(result))


def _route(result: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def routed(self: Any, architectures: Any, model_config: Any) -> Any:
            if getattr(model_config, "model_impl", None) != "torchtitan":
                if result == "_try_load_model_cls":
                    declare_native_specs()
                return original(self, architectures, model_config)
            if problem := unsupported():
                raise BridgeError(problem)
            found = getattr(self, result)(ARCHITECTURE)
            if result == "_try_load_model_cls":
                answer_about_specs()
                tell_compiled_graphs_apart()
                load_compiled_step()
            if found is None:  # vLLM logged why and would go on with its own model
                raise BridgeError(
                    f"model_impl='torchtitan' was asked for, but {MODEL_CLASS} does not import; "
                    "the log above has the reason, and `titan-bridge doctor` says what to install"
                )
            return found, ARCHITECTURE

        return routed

    return wrap


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


def declare_native_specs() -> None:
    """Attach ShardingSpecs to vLLM's own model where `additional_config.titan.attach_specs` asks for it.

    Called in the process that is about to build the model; without the option it does nothing.

    What: wraps `process_weights_after_loading` in the base model loader, which runs when all parameters are built
    and filled and before the first one is repacked. Why: vLLM's layers know how they are cut, and no attribute
    says it. Version: vllm 0.32 (`vllm/model_executor/model_loader/base_loader.py`). Upstream: the proposal to
    expose the sharding of each parameter as DTensor metadata. Delete when: vLLM's layers carry it themselves.

    Raises:
        BridgeError: The loader is not the one that is known.
    """
    if _asks_for_specs() is None:
        return
    answer_about_specs()
    loader: Any = importlib.import_module("vllm.model_executor.model_loader.base_loader")
    original = loader.process_weights_after_loading
    if getattr(original, MARK, False):
        return
    if list(inspect.signature(original).parameters) != ["model", "model_config", "target_device"]:
        raise BridgeError(
            unsupported() or "attach_specs does not know this vLLM's model loader; leave it out"
        )
    native_specs = importlib.import_module("titan_bridge.engine.native_specs")

    @functools.wraps(original)
    def declaring(model: Any, model_config: Any, target_device: Any) -> Any:
        config = _asks_for_specs()
        if config is None:
            return original(model, model_config, target_device)
        if not native_specs.is_declared(model):  # a reload comes here, too
            native_specs.declare(model, config)
        before = native_specs.glimpse(model)
        result = original(model, model_config, target_device)
        native_specs.settle(model, before)
        return result

    setattr(declaring, MARK, True)
    loader.process_weights_after_loading = declaring


def _asks_for_specs() -> Any | None:
    """vLLM's config of the model that is being built here, if it has `attach_specs`."""
    config = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
    return config if config is not None and titan_options(config.additional_config).attach_specs else None


def answer_about_specs() -> None:
    """Give vLLM's worker the methods that `titan_bridge.engine.specs` calls through `collective_rpc`.

    Called in the process that loads a model whose parameters carry specs.

    What: adds three methods to `WorkerBase`, all with names of ours; replaces nothing. Why: `collective_rpc` finds
    methods of the worker by name, and `worker_extension_cls`, the public way to add some, has room for one class,
    the user's. Version: vllm 0.32 (`vllm/v1/worker/worker_base.py`). Delete when: vLLM takes more than one
    extension class, or an entry point for worker methods.
    """
    base = importlib.import_module("vllm.v1.worker.worker_base").WorkerBase
    live = importlib.import_module("titan_bridge.engine.live")
    for name in SPEC_METHODS:
        if not hasattr(base, name):
            setattr(base, name, getattr(live, name))


def tell_compiled_graphs_apart() -> None:
    """Never take another rank's, or another program's, compiled graph for one's own.

    Called in the process that is about to build our model; vLLM's own models are compiled as ever.

    What: wraps torch's `autograd_cache_key`, and replaces the keys that it makes up. Why: for a graph that torch
    cannot give a key it takes `random.random()`, and vLLM seeds `random` alike in every worker: ranks that share a
    cache on disk overwrite each other's graphs under one name, and the next start computes with whichever was last;
    a router's autocast is enough. Version: torch 2.13 (`torch/_functorch/_aot_autograd/autograd_cache.py`).
    Upstream: pytorch/pytorch issue 191323. Delete when: torch makes such keys from something that nobody seeds.
    """
    cache = importlib.import_module("torch._functorch._aot_autograd.autograd_cache")

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def autograd_cache_key(*args: Any, **kwargs: Any) -> tuple[str, list[str]]:
            key, lines = original(*args, **kwargs)
            return (key if key.startswith(cache.AOTAUTOGRAD_CACHE_PREFIX) else uuid.uuid4().hex), lines

        return autograd_cache_key

    _wrap(cache, "autograd_cache_key", ["mod", "example_inputs", "config", "compiler_config_extra"], wrap)


def load_compiled_step() -> None:
    """Let a start use the step that an earlier one compiled, on the CPU, too.

    Called in the process that is about to build our model.

    What: wraps `torch.compiler.load_compiled_function`, and gives what it loads a `finalize_loading` that does nothing,
    if it has none. Why: vLLM calls that on every function it loads, but only its own graph compiler's have it; on the
    CPU, where the backend is inductor, the call fails, and each start compiles again. Version: vllm 0.32
    (`_try_load_aot_compiled_fn` in `vllm/compilation/decorators.py`). Delete when: vLLM asks before it calls.
    """
    compiler = importlib.import_module("torch.compiler")

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_compiled_function(*args: Any, **kwargs: Any) -> Any:
            loaded = original(*args, **kwargs)
            step = loaded._artifacts.compiled_fn
            if not hasattr(step, "finalize_loading"):
                step.finalize_loading = lambda vllm_config: None
            return loaded

        return load_compiled_function

    _wrap(compiler, "load_compiled_function", ["file", "f_globals", "external_data"], wrap)


def read_any_checkpoint() -> None:
    """Make vLLM's load format "titan" known where models are loaded.

    What: imports `titan_bridge.engine.model_loader`, which registers with vLLM's `register_model_loader`, right
    after vLLM imports its own loaders; nothing of vLLM's is replaced. Why: importing them here would cost every
    vLLM process most of a second, and a plugin has no later moment in a worker. Version: vllm 0.32
    (`vllm/model_executor/model_loader/__init__.py`). Delete when: loaders can be registered by name
    ("module:class"), as models can.
    """
    _after_import(
        "vllm.model_executor.model_loader",
        lambda _: importlib.import_module("titan_bridge.engine.model_loader"),
    )


def wait_without_spinning() -> None:
    """Let processes that share a core wait for each other asleep.

    What: wraps `CpuCommunicator._all_group_ranks_share_shm_group_name`, whose "no" makes a tp group use gloo, and, with
    `read_all_replies`, the start of executor and worker, whose message queues sleep from then on. Why: vLLM's
    shared-memory all-reduce and its queues spin; with more workers than cores the one that waits keeps the core from
    the one that it waits for: a start that takes a minute takes more than five, a token three times as long. Only for
    `model_impl="torchtitan"` and only where workers share cores. Version: vllm 0.32
    (`vllm/distributed/device_communicators/cpu_communicator.py`, `shm_broadcast.py` beside it,
    `vllm/v1/executor/multiproc_executor.py`). Delete when: both yield, or vLLM has a switch for it.
    """
    _after_import("vllm.distributed.device_communicators.cpu_communicator", _use_gloo)


def _use_gloo(module: Any) -> None:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def same_name(self: Any) -> bool:
            config = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
            ours = getattr(getattr(config, "model_config", None), "model_impl", None) == "torchtitan"
            return original(self) and not (ours and cpu.shares_cores(os.environ))

        return same_name

    _wrap(module.CpuCommunicator, "_all_group_ranks_share_shm_group_name", ["self"], wrap)


def complete_model_config() -> None:
    """Check config.json before vLLM reads it, and run dp ranks in lockstep that gather each other's weights.

    What: wraps `EngineArgs.create_model_config` for `model_impl="torchtitan"`. Before it, a missing config.json and
    a length over the rope limit are refused in our words. After it, a dense model with
    `additional_config.titan.dense = "shard"` states one expert. Why: the hook of `check_config_early` comes too late
    for the former; `ModelConfig.is_moe` is how vLLM decides whether dp ranks share a process group and step
    together, and an engine's process asks before it loads plugins, so that the data must say it. Version: vllm 0.32
    (`vllm/engine/arg_utils.py`, `vllm/config/model.py`). Delete when: lockstep is a setting of its own.
    """
    _after_import("vllm.engine.arg_utils", _around_model_config)


def _around_model_config(module: Any) -> None:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def create_model_config(self: Any) -> Any:
            if self.model_impl != "torchtitan":
                return original(self)
            if Path(self.model).is_dir() and self.hf_config_path is None:
                rope_covers(model_directory(self.model), self.max_model_len)
            config, options = original(self), titan_options(self.additional_config)
            model = config.model_arch_config
            if options.dense == "shard":
                model.num_experts = max(1, model.num_experts)
            on_cpu = importlib.import_module("vllm.platforms").current_platform.is_cpu()
            if model.is_deepseek_mla and (options.mla == "expanded" or (options.mla == "auto" and on_cpu)):
                model.is_deepseek_mla = False
                text = config.hf_text_config
                model.head_size = text.qk_nope_head_dim + text.qk_rope_head_dim
            return config

        return create_model_config

    _wrap(module.EngineArgs, "create_model_config", ["self"], wrap)


def read_all_replies() -> None:
    """Keep the replies of several workers in step after one of them answered with an error.

    What: wraps `MultiprocExecutor._init_executor`, and makes the list of reply queues one that reads all of them.
    Why: `collective_rpc` stops at the first error and leaves the other workers' replies in their queues, where the
    next call takes them for its own; a `finish_weight_update` without a start is enough. Version: vllm 0.32
    (`vllm/v1/executor/multiproc_executor.py`). Upstream: vllm-project/vllm pull request 57846. Delete when: an
    error leaves no reply behind. Only for `model_impl="torchtitan"` and weight transfer "titan".
    """
    _after_import("vllm.v1.executor.multiproc_executor", _in_step)


def _in_step(module: Any) -> None:
    _fork(module)

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def init_executor(self: Any) -> None:
            original(self)
            config = self.vllm_config
            _sleep_in(self.response_mqs, config)
            transfer = getattr(config.weight_transfer_config, "backend", None)
            if config.model_config.model_impl == "torchtitan" or transfer == TRANSFER_BACKEND:
                replies = importlib.import_module("titan_bridge.engine.replies")
                self.response_mqs = replies.Replies(self.response_mqs)

        return init_executor

    _wrap(module.MultiprocExecutor, "_init_executor", ["self"], wrap)

    def wrap_worker(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def init_message_queues(self: Any, input_shm_handle: Any, vllm_config: Any) -> None:
            original(self, input_shm_handle, vllm_config)
            _sleep_in([self.rpc_broadcast_mq], vllm_config)

        return init_message_queues

    parameters = ["self", "input_shm_handle", "vllm_config"]
    _wrap(module.WorkerProc, "_init_message_queues", parameters, wrap_worker)


def _sleep_in(queues: Iterable[Any], vllm_config: Any) -> None:
    if vllm_config.model_config.model_impl == "torchtitan" and cpu.shares_cores(os.environ):
        waiting = importlib.import_module("titan_bridge.engine.waiting")
        for queue in queues:
            waiting.sleep_while_waiting(queue)


def fork_processes() -> None:
    """Start engine and workers from the server of `engine/forking.py`, where the launcher has started one.

    What: wraps `get_mp_context` where vLLM's modules have it, and answers for itself then; else vLLM's own answer. Why:
    on a CPU vLLM starts every process as a new interpreter, and importing takes longer than all that follows. Version:
    vllm 0.32 (`get_mp_context` in `vllm/utils/system_utils.py`). Delete when: vLLM's CPU platform leaves
    VLLM_WORKER_MULTIPROC_METHOD alone and the variable allows "forkserver", with what to import there.
    """
    for name in ("vllm.v1.engine.utils", "vllm.v1.engine.coordinator"):  # and the executor, in `_in_step`
        _after_import(name, _fork)


def _fork(module: Any) -> None:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_mp_context() -> Any:
            return forking.process_context() or original()

        return get_mp_context

    _wrap(module, "get_mp_context", [], wrap)


def share_fork_server(server: Any, pid: int) -> None:
    """Let what was forked from a server start its own processes from it, too. Called in the forked process.

    What: replaces the method `ensure_running` of multiprocessing's `ForkServer` object, and tells it the server's
    process id. Why: its documentation says that a child uses its parent's server; it starts a new one, which has
    imported nothing. Version: CPython 3.11 to 3.13 (`multiprocessing/forkserver.py`). Delete when: it does.
    """
    server._forkserver_pid = pid
    server.ensure_running = lambda: None


def reload_any_checkpoint() -> None:
    """Let `collective_rpc("reload_weights")` read what `load_format="titan"` reads, into TorchTitan's classes.

    What: wraps the function `reload_weights` of vLLM's loaders. Why: it knows loaders that turn a directory into a
    stream of Hugging Face tensors only, and takes the parameters away from the model while that is read. Other models
    come to vLLM's own. Version: vllm 0.32 (`vllm/model_executor/model_loader/reload/inplace.py`, which says itself
    that it is to be generalized to all loaders). Delete when: a loader can say how it reloads.
    """
    _after_import("vllm.model_executor.model_loader.reload.inplace", _reload_ours)


def _reload_ours(module: Any) -> None:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def reload_weights(
            vllm_config: Any,
            model: Any,
            weights_iterator: Any,
            weights_path: str | None,
            is_checkpoint_format: bool,
        ) -> None:
            ours = vllm_config.model_config.model_impl == "torchtitan"
            reload = importlib.import_module("titan_bridge.engine.reload").reload if ours else original
            reload(vllm_config, model, weights_iterator, weights_path, is_checkpoint_format)

        return reload_weights

    parameters = ["vllm_config", "model", "weights_iterator", "weights_path", "is_checkpoint_format"]
    _wrap(module, "reload_weights", parameters, wrap)


def _after_import(name: str, then: Callable[[ModuleType], Any]) -> None:
    if name in sys.modules:
        then(sys.modules[name])
    elif not any(isinstance(finder, _After) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _After(name, then))


class _After(importlib.abc.MetaPathFinder):
    """Calls `then` with module `name` once it was imported by whoever needs it."""

    def __init__(self, name: str, then: Callable[[ModuleType], Any]) -> None:
        self.name, self._then = name, then

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_both(module: ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec


def _wrap(owner: Any, name: str, parameters: list[str], wrapper: Callable[..., Any]) -> None:
    """Replace the function `owner.name`, once; one that does not take `parameters` refuses torchtitan instead."""
    original = inspect.getattr_static(owner, name, None)
    if original is None or getattr(original, MARK, False):
        return
    known = list(inspect.signature(original).parameters) == parameters
    patched = wrapper(original) if known else _refuse(original)
    setattr(patched, MARK, True)
    setattr(owner, name, patched)


def _refuse(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if any(getattr(arg, "model_impl", None) == "torchtitan" for arg in (*args, *kwargs.values())):
            raise BridgeError(unsupported() or f"titan_bridge does not know this {original.__qualname__}")
        return original(*args, **kwargs)

    return refusing
