"""Shared by the engine tests: a real server in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import descendants
from tests.engine.forked_ranks import fork_ranks
from titan_bridge import cpu
from titan_bridge.ports import free_port

START_SECONDS = 240
END_SECONDS = 60
TITAN_BRIDGE = (sys.executable, "-m", "titan_bridge.cli", "serve")


@contextlib.contextmanager
def _serve(
    model: Path | str, log: Path, *options: str, by: Sequence[str] = TITAN_BRIDGE, **environment: str
) -> Iterator[str]:
    port = free_port()
    # An engine that vLLM kills after its time leaves shared memory, and on a busy machine all takes long.
    ending = ("--shutdown-timeout", str(END_SECONDS))
    command = [*by, str(model), "--host", "127.0.0.1", "--port", str(port), *ending, *options]
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            # Not a session of its own: Linux may schedule sessions as groups ("autogroup"), and on few cores a busy
            # server then keeps the trainer that runs in a test waiting for seconds.
            process_group=0,
            env={**os.environ, **environment},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url
        segments = shared_memory(server.pid)
        server.send_signal(signal.SIGINT)
        assert server.wait(END_SECONDS + 30) == 0
        assert not [left for left in segments if left.exists()]
        assert by is not TITAN_BRIDGE or not [
            line
            for line in log.read_text().splitlines()
            if re.search("nanobind|leaked|resource_tracker", line)
        ]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def shared_memory(pid: int) -> set[Path]:
    """Files in /dev/shm that a process and its children have mapped."""
    found = set()
    for process in [pid, *descendants(pid)]:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/maps").read_text().splitlines()
            found |= {Path(file[1]) for line in lines if (file := re.search(r"(/dev/shm/\S+)", line))}
    return found


@pytest.fixture(autouse=True)
def environment_is_restored() -> Iterator[None]:
    """vLLM sets variables in the process that starts an engine; the next test starts without them."""
    with cpu.variables({}):
        yield


@pytest.fixture(autouse=True, scope="module")
def environment_is_restored_after_a_module() -> Iterator[None]:
    """The same for engines that a module's tests share."""
    with cpu.variables({}):
        yield


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline runs in this process fork their dp ranks."""
    fork_ranks(monkeypatch)


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    """`with serve(model, log, *options, **environment) as url`: `titan-bridge serve` (or `by`), up and answering."""
    return _serve
