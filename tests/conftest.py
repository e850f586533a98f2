"""Shared by all tests: a quiet environment, no test that hangs for ever, no process that outlives the run."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; clearing more at every start takes longer than what most tests do
}.items():
    os.environ.setdefault(_name, _value)

ROOT = Path(__file__).resolve().parent.parent
BACKSTOP_SECONDS = 30
GRACE_SECONDS = 5
_PR_SET_CHILD_SUBREAPER = 36
_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    # Orphaned grandchildren become our children, where the end of the run finds them.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.stash[_STDERR] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Backstop for pytest-timeout, whose signal neither interrupts C code nor gets through an event loop of uvloop.

    A little after it, print where every thread stands and end the child processes, which ends most waits; if it did
    not, end pytest itself.
    """
    marker = item.get_closest_marker("timeout")
    limit = float(marker.args[0] if marker and marker.args else item.config.getini("timeout") or 300)
    done = threading.Event()
    threading.Thread(target=_backstop, args=(item, limit, done), daemon=True).start()
    try:
        return (yield)
    finally:
        done.set()


def _backstop(test: pytest.Item, limit: float, done: threading.Event) -> None:
    if done.wait(limit + BACKSTOP_SECONDS):
        return
    _tell(test.config, f"{test.nodeid} is past its timeout; ending its child processes")
    faulthandler.dump_traceback(file=test.config.stash[_STDERR], all_threads=True)
    kill(descendants())
    if not done.wait(BACKSTOP_SECONDS):
        _tell(test.config, f"{test.nodeid} goes on without them; ending pytest")
        test.config.get_terminal_writer().flush()
        kill(descendants())
        os._exit(pytest.ExitCode.TESTS_FAILED)


def _tell(config: pytest.Config, line: str) -> None:
    os.write(config.stash[_STDERR], f"\n{line}\n".encode())


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.pluginmanager.hasplugin("dsession"):
        return  # its children are pytest-xdist's workers, each of which looks after its own
    left = [pid for pid in descendants() if not _stays(pid)]
    if left:
        names = ", ".join(f"{pid} ({_command(pid)[:80]})" for pid in left)
        _tell(session.config, f"ended processes that tests left behind: {names}")
        kill(left)


def descendants(of: int | None = None) -> list[int]:
    """Process ids of all living children, theirs, and so on; zombies left out."""
    found: list[int] = []
    todo = [of or os.getpid()]
    while todo:
        pid = todo.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                todo += (children := [int(child) for child in task.read_text().split()])
                found += [child for child in children if not _is_zombie(child)]
    return found


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return "?"


def _stays(pid: int) -> bool:
    """Whether it is one of multiprocessing's own, which end with this process."""
    own = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid == own or "resource_tracker" in _command(pid)


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _left(before: set[int]) -> list[int]:
    return [pid for pid in descendants() if pid not in before and not _stays(pid)]


@pytest.fixture
def no_orphans() -> Iterator[None]:
    """Fails the test if a process that it started is still alive `GRACE_SECONDS` after its end."""
    before = set(descendants())
    yield
    left = _left(before)
    deadline = time.monotonic() + GRACE_SECONDS
    while left and time.monotonic() < deadline:  # one that was told to end needs a moment of a busy machine
        time.sleep(0.05)
        left = _left(before)
    commands = [_command(pid) for pid in left]
    kill(left)
    assert not left, f"left alive: {commands}"


@pytest.fixture
def busy_port() -> Iterator[int]:
    """A port on 127.0.0.1 that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def bin_dir() -> Path:
    """Where the console scripts of this environment are."""
    return Path(sys.executable).parent
