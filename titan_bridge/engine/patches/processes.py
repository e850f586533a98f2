"""How vLLM's processes start, wait for each other, answer, and end: patches as those of `upstream.py`."""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from titan_bridge import cpu
from titan_bridge.engine.cpu import forking
from titan_bridge.engine.patches.apply import patch
from titan_bridge.engine.patches.registrations import ours_is_built, wanted

ANSWER_SECONDS = 5
"""For what a server has still to answer when its engine has ended."""
WORKER_SECONDS = 5
"""Beyond vLLM's own time for a worker to end: an executor that lives kills one after four of them."""


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
    return original(self) and not (ours_is_built() and cpu.shares_cores(os.environ))


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


@patch("vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed._init_cpu_shm", "self")
def unlink_shared_memory(original: Callable[..., Any], self: Any) -> int:
    """Leave no shared memory behind, however the workers end.

    What: wraps `_CPUSHMDistributed._init_cpu_shm`, and takes this rank's segment out of /dev/shm as soon as all ranks
    have mapped it, which is where it returns. Why: vLLM does it in a C++ destructor that no worker lives to run, so
    that each start with tp > 1 leaves a segment a rank. Only for `model_impl="torchtitan"`. Version: vllm 0.32
    (`vllm/distributed/device_communicators/cpu_communicator.py`). Delete when: nothing stays there.
    """
    handle = original(self)
    if ours_is_built():
        Path(f"/dev/shm/{self.group_name}_{self.communicator.rank}").unlink(missing_ok=True)
    return handle


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
