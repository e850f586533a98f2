"""No process of a run outlives it, and no two runs share an output folder."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import time
from pathlib import Path

from titan_bridge.errors import BridgeError

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def die_with_parent(with_signal: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent dies, even by kill -9 (Linux)."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, with_signal, 0, 0, 0)


def lock(folder: Path, *, wait: float = 15.0) -> int:
    """Take an output folder for this process and the children that inherit the descriptor.

    Waits a little where the process that took it is gone, since ranks of a run that was killed may still be ending.

    Returns:
        The descriptor; the lock is free once every process that has it ended.

    Raises:
        BridgeError: another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if _runs(os.pread(descriptor, 20, 0)) or time.monotonic() > deadline:
                os.close(descriptor)
                raise BridgeError(
                    f"another run trains in {folder}; wait for it, or choose another out"
                ) from None
            time.sleep(0.2)
        else:
            os.set_inheritable(descriptor, True)
            os.pwrite(descriptor, b"%-19d\n" % os.getpid(), 0)
            return descriptor


def _runs(holder: bytes) -> bool:
    """Whether the process whose id is in the lock file lives on this machine."""
    try:
        os.kill(int(holder), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        return True
    return True
