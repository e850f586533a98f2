"""How an engine takes new weights: paused, written, cached prefixes dropped, version named, resumed, in one turn.

Runs in the process of vLLM's engine core (see `patches.upstream.commit_in_one_turn`), whoever calls
`finish_weight_update`: no client can leave the engine paused, or with prefixes of the old weights, by dying or by not
knowing better. vLLM's own pause does the waiting: for batches in flight, and for dp ranks that step in lockstep.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.v1.engine import EngineCoreRequestType

_DECIDED = "_titan_bridge_decided"
"""Attribute of the engine core: the update that `finish_weight_update` is about to take."""


def call(core: Any, method: Any, kwargs: dict[str, Any] | None, rpc: Callable[[], Any]) -> Any:
    """What an engine with weight transfer "titan" does instead of `rpc`, a call of all its workers."""
    if method == "start_weight_update":
        setattr(core, _DECIDED, None)
    if method == "update_weights":
        result = rpc()
        setattr(core, _DECIDED, (kwargs or {}).get("update_info"))
        return result
    update = getattr(core, _DECIDED, None)
    if method != "finish_weight_update" or update is None:
        return rpc()
    setattr(core, _DECIDED, None)
    paused = core.is_scheduler_paused()  # by somebody who will resume it, too

    def turn() -> Any:
        try:
            core._reset_caches()  # first: where it cannot be done nothing is written
            result = rpc()
            core.set_weight_version(update["version"])
            return result
        finally:
            if not paused:
                core.resume_scheduler()

    idle = _idle(core) if paused else core.pause_scheduler(update.get("pause", "keep"), clear_cache=False)
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


def _idle(core: Any) -> Future[Any] | None:
    """Done when an engine that is paused, or about to be, has nothing in flight; None if it has nothing now."""
    if not getattr(core, "has_work", lambda: False)():
        return None
    future: Future[Any] = Future()
    core._idle_state_callbacks.append(lambda _: future.set_result(None))
    return future
