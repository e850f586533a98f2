"""Wait for messages between engine and workers asleep; see `patches.wait_without_spinning`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import zmq

NAP_MS = 1
"""Longest sleep before the queue is looked at again; a notification can be lost, and vLLM would wait for seconds."""


def sleep_while_waiting(queue: Any) -> None:
    """Let the reader of a vLLM `MessageQueue` wait for its notification where it would give way and ask again."""
    condition = queue._spin_condition  # None: the queue comes from another machine, by a socket
    if condition is not None and condition.is_reader:
        condition.wait = functools.partial(_wait, condition, condition.wait)


def _wait(condition: Any, idle: Callable[[int | None], None], timeout_ms: int | None = None) -> None:
    if time.monotonic() > condition.last_read + condition.busy_loop_s:
        idle(timeout_ms)
    elif condition.local_notify_socket in dict(condition.poller.poll(timeout=NAP_MS)):
        condition.local_notify_socket.recv(flags=zmq.NOBLOCK, copy=False)
