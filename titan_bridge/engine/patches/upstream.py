"""Every change we make to somebody else's code, one function a patch.

Each says what it changes, why, for which version, and when it can be deleted. Its decorator names the target and the
parameters that it must have; where one differs, `require` refuses whatever needs us. `processes.py` beside it has those
of processes; nothing else in the project patches anything.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from titan_bridge import cpu
from titan_bridge.checks import model_directory, overridden, rope_covers
from titan_bridge.engine.options import TRANSFER_BACKEND, titan_options
from titan_bridge.engine.patches import (
    apply,
    processes,  # noqa: F401  its patches are entered when it is imported
)
from titan_bridge.engine.patches.apply import patch
from titan_bridge.engine.patches.registrations import (
    ARCHITECTURE,
    MODEL_CLASS,
    REGISTRATIONS,
    current_config,
    require,
    wanted,
)
from titan_bridge.engine.specs import FINGERPRINTS, LAYOUT, NATIVE, VERIFY
from titan_bridge.errors import BridgeError
from titan_bridge.run_folder import model_and_step
from titan_bridge.versions import unsupported

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
    config = current_config()  # None for whoever asks without building it
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
    if model.is_deepseek_mla and expands_latents(self, on_cpu=on_cpu):
        model.is_deepseek_mla = False
        model.head_size = config.hf_text_config.qk_nope_head_dim + config.hf_text_config.qk_rope_head_dim
    elif model.is_deepseek_mla and on_cpu and not (self.attention_backend or self.attention_config.backend):
        kernels = importlib.import_module("titan_bridge.engine.cpu.head_dims")  # late: it imports torchtitan
        self.attention_backend = kernels.latent_backend(config.dtype)
    return config


def expands_latents(args: Any, *, on_cpu: bool) -> bool:
    """Whether attention with latents is to cache the keys and values of all heads."""
    options = titan_options(args.additional_config)
    sharded = options.shards(_data_parallel_size(args))
    return options.mla == "expanded" or (options.mla == "auto" and (on_cpu or sharded))


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


def _data_parallel_size(args: Any) -> int:
    """As `ParallelConfig` reads it later: that of offline engines, one a rank, is in the environment."""
    return max(args.data_parallel_size, int(os.environ.get("VLLM_DP_SIZE", "1")))


def _bind_workers(args: Any) -> None:
    """Set what several workers need on a CPU, as `titan-bridge` does; what the user has set stays."""
    if cpu.BOUND in os.environ and os.environ[cpu.BOUND] == os.environ.get(
        cpu.BIND
    ):  # ours, for another engine
        for name in (cpu.BIND, cpu.BOUND, cpu.SHARED, cpu.WORKERS):
            os.environ.pop(name, None)
    workers = cpu.local_workers(
        _data_parallel_size(args),
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
    config = current_config()
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
    config = current_config()
    if config is None or not wanted("", config.additional_config, config.weight_transfer_config):
        return
    require()
    if titan_options(config.additional_config).attach_specs:
        answer_about_specs()
        apply.apply("specs")


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
    without the pause dp ranks in lockstep deadlock, in `reload_weights`, too. Version: vllm 0.32
    (`vllm/v1/engine/core.py`; uses `pause_scheduler`, `resume_scheduler`, `_reset_caches`, and `dp_group` of
    `DPEngineCoreProc`). Only for weight transfer "titan", and `reload_weights` of our models. Delete when:
    `finish_weight_update` is a method of the engine core that does all of it, and `reload_weights` one that pauses.
    """

    def rpc() -> Any:
        return original(self, method, timeout, args, kwargs)

    config, loads = self.vllm_config, method == "reload_weights"
    transfers = getattr(config.weight_transfer_config, "backend", None) == TRANSFER_BACKEND
    if not transfers and not (loads and config.model_config.model_impl == "torchtitan"):
        return rpc()
    commit = importlib.import_module("titan_bridge.engine.commit")
    return commit.reload(self, rpc) if loads else commit.call(self, method, args, kwargs, rpc)


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
