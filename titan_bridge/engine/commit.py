"""How an engine takes new weights: paused, written, cached prefixes dropped, version named, resumed, in one turn.

Runs in the process of vLLM's engine core (see `patches.upstream.commit_in_one_turn`), whoever calls
`finish_weight_update`: no client can leave the engine paused, or with prefixes of the old weights, by dying or by not
knowing better. vLLM's own pause does the waiting: for batches in flight, and for dp ranks that step in lockstep.
`reload_weights` is vLLM's and does not drop prefixes, but pauses where dp ranks would wait for each other crosswise.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from vllm.v1.engine import EngineCoreRequestType

from titan_bridge.engine.options import TRANSFER_BACKEND
from titan_bridge.errors import BridgeError
from titan_bridge.transfer.protocol import KEEP_CACHE

_DECIDED = "_titan_bridge_decided"
"""Attribute of the engine core: the update that `finish_weight_update` is about to take."""


def call(
    core: Any, method: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, rpc: Callable[[], Any]
) -> Any:
    """What an engine with weight transfer "titan" does instead of `rpc`, a call of all its workers."""
    if method == "start_weight_update":
        setattr(core, _DECIDED, None)
    if method == "update_weights":
        decided = args[0] if args else (kwargs or {}).get("update_info")
        if isinstance(decided, list):  # one for each worker, as vLLM has it; a trainer's are alike
            decided = decided[0] if decided else None
        if isinstance(decided, dict) and decided.get("pause") == KEEP_CACHE:
            _check_keeping(core)  # before the workers hear of it
        result = rpc()
        setattr(core, _DECIDED, decided)
        return result
    update = getattr(core, _DECIDED, None)
    if method != "finish_weight_update" or update is None:
        return rpc()
    keeping = update.get("pause") == KEEP_CACHE

    def write() -> Any:
        # First: where it cannot be done nothing is written, and the next `finish_weight_update` is this one again.
        _set_apart(core) if keeping else core._reset_caches()
        setattr(core, _DECIDED, None)
        result = rpc()
        core.set_weight_version(update["version"])
        return result

    return _paused(core, "keep" if keeping else update.get("pause", "keep"), write)


def reload(core: Any, rpc: Callable[[], Any]) -> Any:
    """`rpc` is `reload_weights`; nothing that a trainer has sent is the base of a delta after it.

    Into our models all ranks compare what they have found before one writes: where dp ranks step in lockstep, one's
    workers could be in a step, and wait for those of another, which wait for them in that comparison. All stop first.
    """
    config = core.vllm_config

    def load() -> Any:
        if getattr(config.weight_transfer_config, "backend", None) == TRANSFER_BACKEND:
            core.model_executor.collective_rpc(_forget)
        return rpc()

    lockstep = hasattr(core, "dp_group") and config.model_config.model_impl == "torchtitan"
    return _paused(core, "keep", load) if lockstep else load()


def _forget(worker: Any) -> None:
    worker.weight_transfer_engine.worker.forget()


def _paused(core: Any, mode: str, do: Callable[[], Any]) -> Any:
    """What `do` returns, called in a pause; a future of it if batches are in flight."""
    paused = core.is_scheduler_paused()  # by somebody who will resume it

    def turn() -> Any:
        try:
            return do()
        finally:
            if not paused:
                core.resume_scheduler()

    idle = _idle(core) if paused else core.pause_scheduler(mode, clear_cache=False)
    if idle is None:
        return turn()
    taken: Future[Any] = Future()

    def then(idle: Future[Any]) -> None:
        try:
            idle.result()
            taken.set_result(turn())
        except Exception as error:
            taken.set_exception(error)
        # This runs where the engine is about to wait for its next call, since it was idle: its requests are not.
        core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    idle.add_done_callback(then)
    return taken


def _check_keeping(core: Any) -> None:
    """Raises BridgeError where caches besides the prefix cache would have to be parted, too."""
    config = core.vllm_config
    for there, what in (
        (config.kv_transfer_config is not None, "a KV connector"),
        (config.model_config.is_multimodal_model, "a multimodal model"),
    ):
        if there:
            raise BridgeError(
                f'Options.pause is "{KEEP_CACHE}", which an engine with {what} does not do; "keep" computes caches anew'
            )


def _set_apart(core: Any) -> None:
    """Let requests in flight go on with what they have cached, and no other request be served from it.

    What is cached is found no more, and what these requests cache from now on has hashes of their own.
    """
    for scheduler in getattr(core.scheduler, "groups", (core.scheduler,)):
        pool = scheduler.kv_cache_manager.block_pool
        pool.evict_blocks(set(range(len(pool.blocks))))
        for request in scheduler.requests.values():
            if request.num_computed_tokens:
                request.cache_salt = secrets.token_hex(8)
                request.block_hashes.clear()
                request.update_block_hashes()


def _idle(core: Any) -> Future[Any] | None:
    """Done when an engine that is paused, or about to be, has nothing in flight; None if it has nothing now."""
    if not getattr(core, "has_work", lambda: False)():
        return None
    future: Future[Any] = Future()
    core._idle_state_callbacks.append(lambda _: future.set_result(None))
    return future
