"""The engine's control plane as trainer rank 0 uses it: one call at a time, beside the data, each with a time limit."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from titan_bridge.transfer.board import Board
from titan_bridge.transfer.dense import Deadline
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.options import Client, PauseMode

MARGIN = 2.0
"""Seconds that the trainer waits longer than those it waits for, so that it hears their reason."""


class Call(threading.Thread):
    """One call of the client, after the one before, since clients take one at a time."""

    def __init__(self, function: Callable[[], Any], *, after: Call | None) -> None:
        super().__init__(daemon=True)
        self._function, self._after = function, after
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        if self._after is not None:
            self._after.join()
            self._after = None
        try:
            self._function()
        except Exception as error:
            self._error = error

    @property
    def failed(self) -> bool:
        return not self.is_alive() and self._error is not None

    def result(self, seconds: float) -> None:
        """Wait for the end. Raises TransferError with what the engine said, or after the time."""
        self.join(seconds)
        if self.is_alive():
            raise TransferError("the engine did not answer within the time limit")
        if self._error is not None:
            raise TransferError(f"the engine refused: {self._error}")


class Control:
    """Calls of one trainer's client, and the workers' notes that answer them."""

    def __init__(self, client: Client, board: Board, pause: PauseMode | None) -> None:
        self.client, self._board, self._mode = client, board, pause
        self._pending: Call | None = None
        self.open = False
        """Between `start_weight_update` and `finish_weight_update`, as far as this trainer knows."""

    def start(self, function: Callable[[], Any]) -> Call:
        """Begin a call after those that are under way."""
        self._pending = Call(function, after=self._pending)
        return self._pending

    def call(self, function: Callable[[], Any], limit: Deadline) -> None:
        """Call and wait. Raises TransferError with what the engine said, or after the time."""
        self.start(function).result(limit.left + MARGIN)

    def hear(self, key: str, call: Call | None, limit: Deadline) -> Any:
        """A note of a worker; fails early if the call that keeps the worker busy failed."""
        end, pause = Deadline(limit.left + MARGIN), 0.0005
        while not self._board.has(key):
            if call is not None and call.failed and not self._board.has(key):
                call.result(0)
            if end.over:
                raise TransferError(f"waited for {key}: no answer within the time limit")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.003)
        return self._board.read(key, seconds=MARGIN)

    # Around new weights

    def begin(self, limit: Deadline) -> None:
        """Open a session in the engine."""
        self.call(self.client.start_weight_update, limit)
        self.open = True

    def finish(self, limit: Deadline) -> None:
        """Close it."""
        self.call(self.client.finish_weight_update, limit)
        self.open = False

    def finish_quietly(self, limit: Deadline) -> None:
        """Close it if the engine can be reached; the first call fails where an update is dropped."""
        for _ in range(2):
            with contextlib.suppress(TransferError):
                self.finish(limit)
                return
            if self._pending is not None and self._pending.is_alive():
                return  # no answer: another call would only wait behind it

    def pause(self, limit: Deadline) -> bool:
        """Stop the requests in flight as the options say. True: `resume` has to follow.

        False if nobody asked for it, the client cannot, or somebody else has paused the engine and will resume it.
        """
        pause, mode = getattr(self.client, "pause_generation", None), self._mode
        if pause is None or mode is None:
            return False
        if is_paused := getattr(self.client, "is_paused", None):
            answers: list[bool] = []
            self.call(lambda: answers.append(is_paused()), limit)
            if answers[0]:
                return False
        try:
            self.call(lambda: pause(mode), limit)
        except TransferError:
            self.resume()  # "wait" may be over its time, but the engine must not stand still once it is through
            raise
        return True

    def resume(self) -> None:
        """Let requests go on, whether the engine answers or not."""
        resume = getattr(self.client, "resume_generation")  # noqa: B009  only clients that can pause have it
        try:
            Call(resume, after=None).result(MARGIN)
        except TransferError:
            self.start(resume)  # after the pause that may still be on its way

    def settle(self, version: str, limit: Deadline) -> None:
        """What has to follow new weights: no prefix of old ones is used again, and the engine tells its version."""
        if reset := getattr(self.client, "reset_prefix_cache", None):
            self.call(reset, limit)
        if tell := getattr(self.client, "update_weight_version", None):
            self.call(lambda: tell(version), limit)
