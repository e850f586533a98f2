"""Replies of a multi-worker RPC, all of them read also when one is an error; see `patches.read_all_replies`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from vllm.v1.executor.multiproc_executor import WorkerProc

from titan_bridge.engine.log import logger_of

logger = logger_of(__name__)

SECONDS = 60.0
"""How long the others together may take to answer after one worker's error, which waits for them."""


class Replies(list):
    """The reply queues of all workers; iterating reads every one of them up to the end, whatever the first says."""

    def __iter__(self) -> Iterator[Any]:
        for at in range(len(self)):
            yield _Reply(self[at], self[at + 1 :])


class _Reply:
    """One queue, and those that are read after it."""

    def __init__(self, queue: Any, rest: list[Any]) -> None:
        self._queue, self._rest = queue, rest

    def dequeue(self, timeout: float | None = None) -> tuple[Any, Any]:
        """As the queue's; after an error the other workers' replies are taken away, too."""
        status, result = self._queue.dequeue(timeout=timeout)
        if status != WorkerProc.ResponseStatus.SUCCESS:
            deadline = time.monotonic() + SECONDS
            for queue in self._rest:
                try:
                    queue.dequeue(timeout=max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    logger.error(
                        "a worker did not answer a call that failed; later replies may be its late one"
                    )
        return status, result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)
