"""What vLLM's own code looks like is checked where torchtitan is asked for, and nowhere else.

One process imports vLLM and is forked for each case, in which one target of a patch changes before the plugin comes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

CHANGED = """
import functools, importlib, json, os, sys, traceback

model, cases = sys.argv[1], json.loads(sys.stdin.read())
from vllm import EngineArgs
import titan_bridge.engine.preflight
for module in {target.partition(":")[0] for target, _, _ in cases}:
    if module:
        importlib.import_module(module)


def change(target, how):
    module, _, path = target.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, sys.modules[module])
    if how == "gone":
        delattr(owner, name)
    else:
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs))


def answer(target, how, options):
    try:
        if target:
            change(target, how)
        EngineArgs(model=model, **options).create_engine_config()
    except Exception as error:
        return "".join(traceback.format_exception_only(error))
    return "taken"


answers = []
for case in cases:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(answer(*case)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        answers.append(json.loads(stream.read()))
    os.waitpid(child, 0)
print()
print(json.dumps(answers))
"""

REGISTRY = "vllm.model_executor.models.registry:_ModelRegistry"
TARGETS = {
    f"{REGISTRY}.inspect_model_cls": ("changed", "gone"),
    f"{REGISTRY}.resolve_model_cls": ("changed", "gone"),
    "vllm.engine.arg_utils:EngineArgs.create_model_config": ("changed",),  # vLLM itself stops without it
    "vllm.distributed.device_communicators.cpu_communicator:"
    "CpuCommunicator._all_group_ranks_share_shm_group_name": ("changed", "gone"),
    "vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed._init_cpu_shm": (
        "changed",
        "gone",
    ),
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor._init_executor": ("changed", "gone"),
    "vllm.v1.executor.multiproc_executor:WorkerProc._init_message_queues": ("changed", "gone"),
    "vllm.v1.executor.multiproc_executor:WorkerProc.monitor_death_pipe": ("changed", "gone"),
    "uvicorn.server:Server.shutdown": ("changed", "gone"),
    "vllm.v1.executor.multiproc_executor:get_mp_context": ("changed", "gone"),
    "vllm.v1.engine.utils:get_mp_context": ("changed", "gone"),
    "vllm.v1.engine.coordinator:get_mp_context": ("changed", "gone"),
    "vllm.model_executor.model_loader.reload.inplace:reload_weights": ("changed", "gone"),
    "vllm.model_executor.model_loader.base_loader:process_weights_after_loading": ("changed", "gone"),
    "torch._functorch._aot_autograd.autograd_cache:autograd_cache_key": ("changed", "gone"),
    "torch.compiler:load_compiled_function": ("changed", "gone"),
}
VERSIONS = {"vllm": "vllm 0.32", "torch": "torch 2.13", "uvicorn": "uvicorn 0."}
OURS: dict[str, Any] = {"model_impl": "torchtitan"}
STAGES = "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sync_and_gather_intermediate_tensors"
"""Looked at where there are pipeline stages, only."""


def test_a_target_that_changed_is_named_where_torchtitan_is_asked_for(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "qwen3", "qwen3", tokenizer=False)
    queues = "vllm.v1.executor.multiproc_executor:WorkerProc._init_message_queues"
    cases = [(target, how, OURS) for target, hows in TARGETS.items() for how in hows]
    cases += [(STAGES, how, {**OURS, "pipeline_parallel_size": 2}) for how in ("changed", "gone")]
    cases += [
        (queues, "changed", {"weight_transfer_config": {"backend": "titan"}}),
        (queues, "changed", {"additional_config": {"titan": {"attach_specs": True}}}),
        ("vllm.model_executor.models.config:MODELS_CONFIG_MAP", "gone", OURS),
        ("vllm.model_executor.model_loader:register_model_loader", "gone", OURS),
    ]
    fine = [
        ("", "", OURS),
        (STAGES, "changed", OURS),
        ("", "", {**OURS, "pipeline_parallel_size": 2}),
        (queues, "changed", {}),
        (queues, "gone", {"model_impl": "vllm"}),
    ]
    done = subprocess.run(
        [sys.executable, "-c", CHANGED, str(model)],
        input=json.dumps(cases + fine), capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    wrong = []
    for (target, how, options), answer in zip(cases, answers, strict=False):
        module, _, name = target.partition(":")
        version = f"titan_bridge does not know this {VERSIONS[module.split('.')[0]]}"
        facts = (version, module, name, "takes (args, kwargs), expected (" if how == "changed" else "")
        if not all(fact in answer for fact in facts):
            wrong.append((target, how, options, answer))
    assert not wrong, "\n".join(map(str, wrong))
    assert answers[len(cases) :] == ["taken"] * len(fine)


def test_an_error_waits_for_the_other_workers_once_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What those who answered have said is taken away, whatever the time that the call has itself."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.v1.executor.multiproc_executor import WorkerProc

    from titan_bridge.engine.patches import replies

    monkeypatch.setattr(replies, "SECONDS", 1.0)
    status = WorkerProc.ResponseStatus
    writers = [MessageQueue(1, 1) for _ in range(5)]
    readers = [MessageQueue.create_from_handle(each.export_handle(), 0) for each in writers]
    writers[0].enqueue((status.FAILURE, "wrong"))
    writers[4].enqueue((status.SUCCESS, "late"))
    started = time.monotonic()
    first = next(iter(replies.Replies(readers)))
    assert first.dequeue(timeout=300) == (status.FAILURE, "wrong")
    assert 0.9 < time.monotonic() - started < 2
    with pytest.raises(TimeoutError):
        readers[4].dequeue(timeout=0)
