"""A dead man's switch: lets a paused server go on when the trainer that paused it has died.

A small process beside the trainer hears of every pause. This file is also its program, and imports nothing that takes
time to start.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import urllib.request

_PAUSED, _RESUMED = b"p", b"r"
_LOOK_SECONDS = 0.5
_CALL_SECONDS = 60
RESET, RESUME = "reset_prefix_cache?reset_running_requests=true", "resume"
"""Routes of the server. Without the reset vLLM keeps the prefixes of frozen requests, which hold blocks."""


class Guard:
    """Watches over one server for as long as this process lives."""

    def __init__(self, base_url: str) -> None:
        self._url = base_url
        self._process: subprocess.Popen[bytes] | None = None

    def paused(self) -> None:
        """Tell it that the server is about to be paused; starts it the first time."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-I", __file__, str(os.getpid()), self._url]
            # A session of its own: Ctrl-C is for the trainer.
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._tell(_PAUSED)

    def resumed(self) -> None:
        """Tell it that the server goes on."""
        self._tell(_RESUMED)

    def close(self) -> None:
        """End it, as the end of the trainer does."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _tell(self, word: bytes) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # somebody ended it: the trainer is still there
                self._process.stdin.write(word)
                self._process.stdin.flush()


def watch(trainer: int, url: str) -> None:
    """Wait for the trainer to end; the pipe alone would not show it where other processes hold its end, too."""
    last = _RESUMED
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], _LOOK_SECONDS)
        if ready:
            words = os.read(sys.stdin.fileno(), 1024)
            if not words:
                break
            last = words[-1:]
        elif os.getppid() != trainer:
            break
    if last == _PAUSED:
        # The trainer may have died after new weights were taken, and before the prefixes of the old ones were dropped.
        for route in (RESET, RESUME):
            with contextlib.suppress(OSError):
                request = urllib.request.Request(f"{url}/{route}", method="POST")
                urllib.request.urlopen(request, timeout=_CALL_SECONDS).close()


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
