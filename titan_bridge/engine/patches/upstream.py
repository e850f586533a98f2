"""Every change we make to somebody else's code, one function a patch.

Each says what it changes, why, for which version, and when it can be deleted. Its decorator names the target and the
parameters that it must have; where one differs, `require` refuses whatever needs us. Nothing else in the project
patches anything.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from titan_bridge import cpu
from titan_bridge.checks import model_directory, overridden, rope_covers
from titan_bridge.engine.cpu import forking
from titan_bridge.engine.options import TRANSFER_BACKEND, titan_options
from titan_bridge.engine.patches import apply
from titan_bridge.engine.patches.apply import patch
from titan_bridge.engine.patches.registrations import (
    ARCHITECTURE,
    MODEL_CLASS,
    REGISTRATIONS,
    require,
    wanted,
)
from titan_bridge.engine.specs import FINGERPRINTS, LAYOUT, NATIVE, VERIFY
from titan_bridge.errors import BridgeError
from titan_bridge.run_folder import model_and_step
from titan_bridge.versions import unsupported

ANSWER_SECONDS = 5
"""For what a server has still to answer when its engine has ended."""
WORKER_SECONDS = 5
"""Beyond vLLM's own time for a worker to end: an executor that lives kills one after four of them."""
SPEC_METHODS = (LAYOUT, NATIVE, VERIFY, FINGERPRINTS)


def install() -> None:
    """Apply the patches and registrations that every vLLM process needs.

    What fails here is said by `require`, to those who ask for us: all others keep a vLLM that works.
    """
    for register in REGISTRATIONS:
        with contextlib.suppress(Exception):
            register()
    apply.apply("start")


REGISTRY = "vllm.model_executor.models.registry:_ModelRegistry"
"""Wrapped in two places to make `model_impl="torchtitan"` resolve to our class.

Why: `ModelConfig.model_impl` takes any string, but the registry knows only its own four and serves vLLM's own model for
all others without a word. Version: vllm 0.32 (`vllm/model_executor/models/registry.py`). Delete when: vLLM lets a
plugin register a model implementation by name.
"""


@patch(f"{REGISTRY}.inspect_model_cls", "self", "architectures", "model_config")
def inspect_our_class(original: Callable[..., Any], self: Any, architectures: Any, model_config: Any) -> Any:
    """What vLLM asks about the class where the config is made; see `REGISTRY`."""
    if getattr(model_config, "model_impl", None) != "torchtitan":
        return original(self, architectures, model_config)
    return _ours(self._try_inspect_model_cls)


@patch(f"{REGISTRY}.resolve_model_cls", "self", "architectures", "model_config")
def resolve_our_class(original: Callable[..., Any], self: Any, architectures: Any, model_config: Any) -> Any:
    """The class itself, in a process that is about to build the model; see `REGISTRY`."""
    if getattr(model_config, "model_impl", None) != "torchtitan":
        declare_native_specs()
        return original(self, architectures, model_config)
    found = _ours(self._try_load_model_cls)
    answer_about_specs()
    apply.apply("build")
    config = _current_config()  # None for whoever asks without building it
    if config is not None and config.parallel_config.pipeline_parallel_size > 1:
        apply.apply("stages")
    return found


def _ours(find: Callable[[str], Any]) -> tuple[Any, str]:
    if problem := unsupported():
        raise BridgeError(problem)
    require()
    found = find(ARCHITECTURE)
    if found is None:  # vLLM logged why and would go on with its own model
        raise BridgeError(
            f"model_impl='torchtitan' was asked for, but {MODEL_CLASS} does not import; "
            "the log above has the reason, and `titan-bridge doctor` says what to install"
        )
    return found, ARCHITECTURE


@patch("vllm.engine.arg_utils:EngineArgs.create_model_config", "self")
def complete_model_config(original: Callable[..., Any], self: Any) -> Any:
    """Find a training run's folder and step, check config.json, and run dp ranks in lockstep that share weights.

    What: wraps `EngineArgs.create_model_config` for whatever asks for us. Before it, for `model_impl="torchtitan"`, the
    output folder of a run or one step in it becomes the model folder and the step for all workers, and a missing
    config.json and a length over the rope limit are refused in our words. After it, latents that are expanded before
    they are cached are no latent attention to vLLM, on CPUs a backend that computes them is chosen, and a dense model
    with `additional_config.titan.dense = "shard"` states one expert. Why: the hook of `check_config_early` comes too
    late for the former; `ModelConfig.is_moe` is how vLLM decides whether dp ranks share a process group and step
    together, and an engine's process asks before it loads plugins, so that the data must say it. Version: vllm 0.32
    (`vllm/engine/arg_utils.py`, `vllm/config/model.py`). Delete when: lockstep is a setting of its own.
    """
    if not wanted(self.model_impl, self.additional_config, self.weight_transfer_config):
        return original(self)
    require()
    if self.model_impl != "torchtitan":
        return original(self)
    _bind_workers(self)
    options = titan_options(self.additional_config)
    if Path(self.model).is_dir():
        self.served_model_name = self.served_model_name or self.model
        self.model, step = model_and_step(self.model, options.step)
        if step is not None:
            ours = {**self.additional_config.get("titan", {}), "step": step}
            self.additional_config = {**self.additional_config, "titan": ours}
        if self.hf_config_path is None:
            hf = model_directory(self.model)
            rope_covers(overridden(hf, self.hf_overrides), self.max_model_len)
            _read_as_it_is_served(self, hf)
    config = original(self)
    model = config.model_arch_config
    if options.dense == "shard":
        model.num_experts = max(1, model.num_experts)
    on_cpu = importlib.import_module("vllm.platforms").current_platform.is_cpu()
    sharded = options.dense == "shard" and self.data_parallel_size > 1
    if model.is_deepseek_mla and (
        options.mla == "expanded" or (options.mla == "auto" and (on_cpu or sharded))
    ):
        model.is_deepseek_mla = False
        model.head_size = config.hf_text_config.qk_nope_head_dim + config.hf_text_config.qk_rope_head_dim
    elif model.is_deepseek_mla and on_cpu and not (self.attention_backend or self.attention_config.backend):
        kernels = importlib.import_module("titan_bridge.engine.cpu.head_dims")  # late: it imports torchtitan
        self.attention_backend = kernels.latent_backend(config.dtype)
    return config


def _read_as_it_is_served(args: Any, hf: Mapping[str, Any]) -> None:
    """Let vLLM take a config.json that transformers does not know, or that says how weights are quantized.

    The loader reads these as full ones.
    """
    # Here, so that a process that serves something else imports none of it.
    from titan_bridge.models import family_for, quantization  # noqa: PLC0415

    kind = family_for(hf).config_class
    if kind is not None:
        importlib.import_module("transformers").AutoConfig.register(kind.model_type, kind, exist_ok=True)
    if quantization.read(hf) is not None and isinstance(args.hf_overrides, dict):
        args.hf_overrides = {**args.hf_overrides, quantization.KEY: None}


def _bind_workers(args: Any) -> None:
    """Set what several workers need on a CPU, as `titan-bridge` does; what the user has set stays."""
    if cpu.BOUND in os.environ and os.environ[cpu.BOUND] == os.environ.get(
        cpu.BIND
    ):  # ours, for another engine
        for name in (cpu.BIND, cpu.BOUND, cpu.SHARED, cpu.WORKERS):
            os.environ.pop(name, None)
    workers = cpu.local_workers(
        max(args.data_parallel_size, int(os.environ.get("VLLM_DP_SIZE", "1"))),
        args.tensor_parallel_size * args.pipeline_parallel_size,
        nnodes=args.nnodes,
        dp_local=args.data_parallel_size_local,
    )
    if workers == 1 or cpu.BIND in os.environ:
        return
    sizes = ("kv_cache_memory_bytes", "gpu_memory_utilization")
    given = {name: 1 for name in sizes if getattr(args, name) != getattr(type(args), name)}
    added = cpu.environment(workers, given=os.environ, options=given)
    if cpu.BIND in added:
        os.environ.update({**added, cpu.BOUND: added[cpu.BIND]})


@patch(
    "vllm.model_executor.model_loader.base_loader:process_weights_after_loading",
    "model", "model_config", "target_device",
    when="specs",
)  # fmt: skip
def declare_while_loading(
    original: Callable[..., Any], model: Any, model_config: Any, target_device: Any
) -> Any:
    """Attach ShardingSpecs to vLLM's own model where `additional_config.titan.attach_specs` asks for it.

    What: wraps `process_weights_after_loading` in the base model loader, which runs when all parameters are built
    and filled and before the first one is repacked. Why: vLLM's layers know how they are cut, and no attribute
    says it. Version: vllm 0.32 (`vllm/model_executor/model_loader/base_loader.py`). Upstream: the proposal to
    expose the sharding of each parameter as DTensor metadata. Delete when: vLLM's layers carry it themselves.
    """
    config = _current_config()
    if config is None or not titan_options(config.additional_config).attach_specs:
        return original(model, model_config, target_device)
    native_specs = importlib.import_module("titan_bridge.engine.native.specs")
    if not native_specs.is_declared(model):  # a reload comes here, too
        native_specs.declare(model, config)
    before = native_specs.glimpse(model)
    result = original(model, model_config, target_device)
    native_specs.settle(model, before)
    return result


def declare_native_specs() -> None:
    """Get ready for `attach_specs` where vLLM's own model is about to be built; without the option, do nothing."""
    config = _current_config()
    if config is None or not wanted("", config.additional_config, config.weight_transfer_config):
        return
    require()
    if titan_options(config.additional_config).attach_specs:
        answer_about_specs()
        apply.apply("specs")


def _current_config() -> Any:
    """vLLM's config of the model that is being built here; None where there is none."""
    return importlib.import_module("vllm.config").get_current_vllm_config_or_none()


def _ours_is_built() -> bool:
    """Whether this process builds, or is about to build, a model for `model_impl="torchtitan"`."""
    return getattr(getattr(_current_config(), "model_config", None), "model_impl", None) == "torchtitan"


def answer_about_specs() -> None:
    """Give vLLM's worker the methods that `titan_bridge.engine.specs` calls through `collective_rpc`.

    Called in the process that loads a model whose parameters carry specs.

    What: adds four methods to `WorkerBase`, all with names of ours; replaces nothing. Why: `collective_rpc` finds
    methods of the worker by name, and `worker_extension_cls`, the public way to add some, has room for one class,
    the user's. Version: vllm 0.32 (`vllm/v1/worker/worker_base.py`). Delete when: vLLM takes more than one
    extension class, or an entry point for worker methods.
    """
    base = importlib.import_module("vllm.v1.worker.worker_base").WorkerBase
    live = importlib.import_module("titan_bridge.engine.live")
    for name in SPEC_METHODS:
        if not hasattr(base, name):
            setattr(base, name, getattr(live, name))


@patch(
    "torch._functorch._aot_autograd.autograd_cache:autograd_cache_key",
    "mod", "example_inputs", "config", "compiler_config_extra",
    when="build",
)  # fmt: skip
def tell_compiled_graphs_apart(
    original: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[str, list[str]]:
    """Never take another rank's, or another program's, compiled graph for one's own.

    Called in the process that is about to build our model; vLLM's own models are compiled as ever.

    What: wraps torch's `autograd_cache_key`, and replaces the keys that it makes up. Why: for a graph that torch
    cannot give a key it takes `random.random()`, and vLLM seeds `random` alike in every worker: ranks that share a
    cache on disk overwrite each other's graphs under one name, and the next start computes with whichever was last;
    a router's autocast is enough. Version: torch 2.13 (`torch/_functorch/_aot_autograd/autograd_cache.py`).
    Upstream: pytorch/pytorch issue 191323. Delete when: torch makes such keys from something that nobody seeds.
    """
    prefix = importlib.import_module("torch._functorch._aot_autograd.autograd_cache").AOTAUTOGRAD_CACHE_PREFIX
    key, lines = original(*args, **kwargs)
    return (key if key.startswith(prefix) else uuid.uuid4().hex), lines


@patch("torch.compiler:load_compiled_function", "file", "f_globals", "external_data", when="build")
def load_compiled_step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Let a start use the step that an earlier one compiled, on the CPU, too.

    Called in the process that is about to build our model.

    What: wraps `torch.compiler.load_compiled_function`, and gives what it loads a `finalize_loading` that does nothing,
    if it has none. Why: vLLM calls that on every function it loads, but only its own graph compiler's have it; on the
    CPU, where the backend is inductor, the call fails, and each start compiles again. Version: vllm 0.32
    (`_try_load_aot_compiled_fn` in `vllm/compilation/decorators.py`). Delete when: vLLM asks before it calls.
    """
    loaded = original(*args, **kwargs)
    step = loaded._artifacts.compiled_fn
    if not hasattr(step, "finalize_loading"):
        step.finalize_loading = lambda vllm_config: None
    return loaded


@patch(
    "vllm.distributed.device_communicators.cpu_communicator:"
    "CpuCommunicator._all_group_ranks_share_shm_group_name",
    "self",
)
def wait_without_spinning(original: Callable[..., Any], self: Any) -> bool:
    """Let processes that share a core wait for each other asleep.

    What: wraps `CpuCommunicator._all_group_ranks_share_shm_group_name`, whose "no" makes a tp group use gloo, and, with
    `read_all_replies`, the start of executor and worker, whose message queues sleep from then on. Why: vLLM's
    shared-memory all-reduce and its queues spin; with more workers than cores the one that waits keeps the core from
    the one that it waits for: a start that takes a minute takes more than five, a token three times as long. Only for
    `model_impl="torchtitan"` and only where workers share cores. Version: vllm 0.32
    (`vllm/distributed/device_communicators/cpu_communicator.py`, `shm_broadcast.py` beside it,
    `vllm/v1/executor/multiproc_executor.py`). Delete when: both yield, or vLLM has a switch for it.
    """
    return original(self) and not (_ours_is_built() and cpu.shares_cores(os.environ))


@patch("vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed._init_cpu_shm", "self")
def unlink_shared_memory(original: Callable[..., Any], self: Any) -> int:
    """Leave no shared memory behind, however the workers end.

    What: wraps `_CPUSHMDistributed._init_cpu_shm`, and takes this rank's segment out of /dev/shm as soon as all ranks
    have mapped it, which is where it returns. Why: vLLM does it in a C++ destructor that no worker lives to run, so
    that each start with tp > 1 leaves a segment a rank. Only for `model_impl="torchtitan"`. Version: vllm 0.32
    (`vllm/distributed/device_communicators/cpu_communicator.py`). Delete when: nothing stays there.
    """
    handle = original(self)
    if _ours_is_built():
        Path(f"/dev/shm/{self.group_name}_{self.communicator.rank}").unlink(missing_ok=True)
    return handle


@patch("vllm.v1.executor.multiproc_executor:MultiprocExecutor._init_executor", "self")
def read_all_replies(original: Callable[..., Any], self: Any) -> None:
    """Keep the replies of several workers in step after one of them answered with an error.

    What: wraps `MultiprocExecutor._init_executor`, and makes the list of reply queues one that reads all of them.
    Why: `collective_rpc` stops at the first error and leaves the other workers' replies in their queues, where the
    next call takes them for its own; a `finish_weight_update` without a start is enough. Version: vllm 0.32
    (`vllm/v1/executor/multiproc_executor.py`). Upstream: vllm-project/vllm pull request 57846. Delete when: an
    error leaves no reply behind. Only for `model_impl="torchtitan"` and weight transfer "titan".
    """
    original(self)
    config = self.vllm_config
    _sleep_in(self.response_mqs, config)
    if wanted(config.model_config.model_impl, None, config.weight_transfer_config):
        replies = importlib.import_module("titan_bridge.engine.patches.replies")
        self.response_mqs = replies.Replies(self.response_mqs)


@patch("vllm.v1.engine.core:EngineCore.collective_rpc", "self", "method", "timeout", "args", "kwargs")
def commit_in_one_turn(
    original: Callable[..., Any],
    self: Any,
    method: Any,
    timeout: float | None = None,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Pause, write new weights, drop cached prefixes, name the version and resume, in one turn of the engine.

    What: wraps `EngineCore.collective_rpc`; `engine/commit.py` does it where `finish_weight_update` is called. Why:
    vLLM leaves pausing, dropping and resuming to the client, as calls of their own: one that dies in between leaves a
    server that stands still, one that does not know of them a server that answers from prefixes of old weights, and
    without the pause dp ranks in lockstep deadlock. Version: vllm 0.32 (`vllm/v1/engine/core.py`; uses
    `pause_scheduler`, `resume_scheduler`, `_reset_caches`). Only for weight transfer "titan". Delete when:
    `finish_weight_update` is a method of the engine core that does all of it.
    """

    def rpc() -> Any:
        return original(self, method, timeout, args, kwargs)

    if getattr(self.vllm_config.weight_transfer_config, "backend", None) != TRANSFER_BACKEND:
        return rpc()
    return importlib.import_module("titan_bridge.engine.commit").call(self, method, kwargs, rpc)


@patch("uvicorn.server:Server.shutdown", "self", "sockets")
def end_after_the_engine(original: Callable[..., Any], self: Any, sockets: Any = None) -> Any:
    """Let a server end although somebody waits for an answer of its engine.

    What: wraps `uvicorn.Server.shutdown`, and gives the requests that are left `ANSWER_SECONDS`. Why: vLLM's server
    ends its engine first. A call that the engine has not answered by then, such as a weight update that waits for the
    step under way, is never answered, and uvicorn waits for it for ever; a second SIGTERM changes nothing. Only for
    `model_impl="torchtitan"` and weight transfer "titan". Version: vllm 0.32
    (`vllm/entrypoints/launchers/launcher.py`), uvicorn 0.54. Delete when: vLLM fails the calls of an engine that has
    ended, or sets `timeout_graceful_shutdown`.
    """
    engine = getattr(getattr(self.config.app, "state", None), "engine_client", None)
    if engine is not None and self.config.timeout_graceful_shutdown is None:
        config = engine.vllm_config
        if wanted(config.model_config.model_impl, None, config.weight_transfer_config):
            self.config.timeout_graceful_shutdown = ANSWER_SECONDS
    return original(self, sockets)


@patch(
    "vllm.v1.executor.multiproc_executor:WorkerProc.monitor_death_pipe",
    "self",
    "death_pipe",
    "shutdown_requested",
)
def end_with_the_engine(
    original: Callable[..., Any], self: Any, death_pipe: Any, shutdown_requested: threading.Event
) -> None:
    """End a worker whose engine is gone, whatever it waits for.

    What: wraps `WorkerProc.monitor_death_pipe`, and ends the process some seconds after it was told to end. Why:
    vLLM closes the worker's queues and no more. One that is inside an all-reduce then waits for ever, on a core of its
    own, for others that have ended already; an engine that did not drain its requests in time leaves such workers. Only
    for `model_impl="torchtitan"` and weight transfer "titan". Version: vllm 0.32
    (`vllm/v1/executor/multiproc_executor.py`). Delete when: a worker ends with its engine.
    """
    original(self, death_pipe, shutdown_requested)
    config = self.worker.vllm_config
    if not wanted(config.model_config.model_impl, None, config.weight_transfer_config):
        return

    def end() -> None:
        shutdown_requested.wait()
        envs = importlib.import_module("vllm.envs")
        time.sleep(envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS + WORKER_SECONDS)
        os._exit(1)

    threading.Thread(target=end, name="titan-end", daemon=True).start()


@patch(
    "vllm.v1.executor.multiproc_executor:WorkerProc._init_message_queues",
    "self", "input_shm_handle", "vllm_config",
)  # fmt: skip
def sleep_in_workers(
    original: Callable[..., Any], self: Any, input_shm_handle: Any, vllm_config: Any
) -> None:
    """The worker's part of `wait_without_spinning`."""
    original(self, input_shm_handle, vllm_config)
    _sleep_in([self.rpc_broadcast_mq], vllm_config)


def _sleep_in(queues: Iterable[Any], vllm_config: Any) -> None:
    if vllm_config.model_config.model_impl == "torchtitan" and cpu.shares_cores(os.environ):
        waiting = importlib.import_module("titan_bridge.engine.cpu.waiting")
        for queue in queues:
            waiting.sleep_while_waiting(queue)


@patch("vllm.v1.engine.utils:get_mp_context")
@patch("vllm.v1.engine.coordinator:get_mp_context")
@patch("vllm.v1.executor.multiproc_executor:get_mp_context")
def fork_processes(original: Callable[..., Any]) -> Any:
    """Start engine and workers from the server of `engine/cpu/forking.py`, where the launcher has started one.

    What: wraps `get_mp_context` where vLLM's modules have it, and answers for itself then; else vLLM's own answer. Why:
    on a CPU vLLM starts every process as a new interpreter, and importing takes longer than all that follows. Version:
    vllm 0.32 (`get_mp_context` in `vllm/utils/system_utils.py`). Delete when: vLLM's CPU platform leaves
    VLLM_WORKER_MULTIPROC_METHOD alone and the variable allows "forkserver", with what to import there.
    """
    return forking.process_context(share_fork_server) or original()


def share_fork_server(server: Any, pid: int) -> None:
    """Let what was forked from a server start its own processes from it, too. Called in the forked process.

    What: replaces the method `ensure_running` of multiprocessing's `ForkServer` object, and tells it the server's
    process id. Why: its documentation says that a child uses its parent's server; it starts a new one, which has
    imported nothing. Version: CPython 3.11 to 3.13 (`multiprocessing/forkserver.py`). Delete when: it does.
    """
    server._forkserver_pid = pid
    server.ensure_running = lambda: None


@patch(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sync_and_gather_intermediate_tensors",
    "self", "num_tokens", "intermediate_tensors", "sync_self",
    when="stages",
)  # fmt: skip
def make_room_for_hidden_states(
    original: Callable[..., Any], self: Any, num_tokens: int, intermediate_tensors: Any, sync_self: bool
) -> Any:
    """Give a pipeline stage on a CPU the buffer into which vLLM copies what the stage before it sends.

    What: wraps `GPUModelRunner.sync_and_gather_intermediate_tensors`, and makes the buffer where there is none, as
    `_dummy_run` does. Why: that runs while vLLM warms up, which its runner for CPUs leaves out in eager mode, and the
    first step ends in an assertion. Version: vllm 0.32 (`vllm/v1/worker/gpu_model_runner.py`, `warming_up_model` in
    `cpu_model_runner.py` beside it). Delete when: the runner makes the buffer when it is built.
    """
    if self.intermediate_tensors is None:
        self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
            batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )
    return original(self, num_tokens, intermediate_tensors, sync_self)


@patch(
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.create_lora_manager", "self", "model", "vllm_config",
    when="build",
)  # fmt: skip
def manage_adapters(original: Callable[..., Any], self: Any, model: Any, vllm_config: Any) -> Any:
    """Let vLLM manage LoRA adapters of TorchTitan's linear layers.

    What: wraps `LRUCacheWorkerLoRAManager.create_lora_manager`, gives it the manager's class that the model names, and
    tells that manager of each adapter and its name. Why: vLLM's own takes its own linear layers and no others, and
    forgets names in workers. Version: vllm 0.32 (`vllm/lora/worker_manager.py`).
    Delete when: a model can name the class, or a linear layer of another package can say how it is wrapped.
    """
    self._manager_cls = getattr(model, "adapter_manager", self._manager_cls)
    if hasattr(model, "adapter_manager"):
        load = self._load_adapter

        def named(request: Any) -> Any:
            adapter = load(request)
            self._adapter_manager.loaded(adapter, request)
            return adapter

        self._load_adapter = named
    return original(self, model, vllm_config)


@patch(
    "vllm.model_executor.model_loader.reload.inplace:reload_weights",
    "vllm_config", "model", "weights_iterator", "weights_path", "is_checkpoint_format",
)  # fmt: skip
def reload_any_checkpoint(
    original: Callable[..., Any],
    vllm_config: Any,
    model: Any,
    weights_iterator: Any,
    weights_path: str | None,
    is_checkpoint_format: bool,
) -> None:
    """Let `collective_rpc("reload_weights")` read what `load_format="titan"` reads, into TorchTitan's classes.

    What: wraps the function `reload_weights` of vLLM's loaders. Why: it knows loaders that turn a directory into a
    stream of Hugging Face tensors only, and takes the parameters away from the model while that is read. Other models
    come to vLLM's own. Version: vllm 0.32 (`vllm/model_executor/model_loader/reload/inplace.py`, which says itself
    that it is to be generalized to all loaders). Delete when: a loader can say how it reloads.
    """
    ours = vllm_config.model_config.model_impl == "torchtitan"
    reload = importlib.import_module("titan_bridge.engine.loading.reload").reload if ours else original
    reload(vllm_config, model, weights_iterator, weights_path, is_checkpoint_format)
