"""dp ranks that are forked from the process that engines are forked from: they import nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import Pipe, connection, forkserver
from typing import Any

import pytest

from titan_bridge import cpu
from titan_bridge.engine.cpu import forking
from titan_bridge.engine.patches import processes
from titan_bridge.engine.run import ranks


def fork_ranks(patch: pytest.MonkeyPatch) -> None:
    """Let `ranks.start` fork its processes, until the patch is undone."""
    patch.delenv(forking.METHOD, raising=False)  # vLLM sets it where a test has started an engine
    if forkserver._forkserver._forkserver_pid != forking.server_pid():  # type: ignore[attr-defined]
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # an earlier test's, without what ranks import
    patch.setattr(ranks, "_process", Rank)


class Rank:
    """As much of `subprocess.Popen` as `ranks` uses."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        theirs, ours = Pipe(duplex=False)
        with cpu.variables({**environment, **cpu.set_by_vllm(environment)}):
            forking.start()
            context: Any = forking.process_context(processes.share_fork_server)
            self._process = context.Process(target=_rank, args=(theirs,))
            self._process.start()
        theirs.close()
        self.stdin = os.fdopen(os.dup(ours.fileno()), "wb")
        ours.close()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def _rank(stdin: connection.Connection) -> None:
    os.setpgid(0, 0)
    os.dup2(stdin.fileno(), 0)
    sys.stdin = os.fdopen(0)
    sys.exit(ranks._run_rank())
