"""Fork vLLM's processes from one that has imported everything, on a CPU.

On its CPU backend vLLM starts the engine and then each worker as a new interpreter, and every one spends some eight
seconds of a core importing the same modules: most of what a small model takes to start. Here one process without
threads (multiprocessing's fork server) imports them while the launcher imports its own, and the others are forked from
it. They get what a new interpreter takes from its parent: environment, standard output and error.

OpenMP reads its environment once, when it is loaded. A worker that computes on one core needs no more than to be bound
to it; one whose threads are spread over several is started as vLLM starts it, and so are all if the environment was
changed in a way that only a new process would notice. `VLLM_WORKER_MULTIPROC_METHOD=spawn` turns all of this off.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import context, forkserver, util
from multiprocessing.reduction import DupFd
from typing import Any

from titan_bridge import cpu
from titan_bridge.errors import BridgeError

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"

_PRELOAD = "titan_bridge.engine.cpu.preloaded"
_NOTICED_ONCE = (
    "LD_PRELOAD",
    "GLIBC_",
    "MALLOC_",
    "KMP_",
    "MKL_",
    "PYTHON",
    "TORCH_",
    "TORCHDYNAMO_",
    "VLLM_LOGGING_",
)
"""How the names of variables begin that a process reads when it starts, or when it imports."""

_server: Any = forkserver._forkserver  # type: ignore[attr-defined]  # the one server that a process can have
_ours: tuple[int, dict[str, str]] | None = None
"""Our server's process id, and the variables that it has noticed; known in what is forked from it, too."""


_FOLDER_BYTES = 70
"""Of a socket's 107 bytes, what multiprocessing's and vLLM's names leave to the folder of temporary files."""


def start() -> None:
    """Start the server, which goes on importing while this process does; nothing if it runs, or is not wanted.

    To be called with the environment set, before vLLM is imported, by a process that will start an engine.

    Raises:
        BridgeError: a folder of temporary files whose path is too long.
    """
    global _ours
    if not cpu.is_cpu_backend():
        return
    if os.environ.get(METHOD) == "spawn":
        stop()
        return
    if len(os.fsencode(folder := tempfile.gettempdir())) > _FOLDER_BYTES:
        raise BridgeError(
            f"TMPDIR={folder} is too long for the sockets in it; allowed: {_FOLDER_BYTES} bytes"
        )
    ahead = cpu.set_by_vllm(os.environ)
    noticed = _noticed({**os.environ, **ahead})
    running = _server._forkserver_pid
    if _ours == (running, noticed):
        return
    if running is not None:
        if _ours is None or _ours[0] != running:
            return  # somebody else's
        stop()
    with cpu.variables({**ahead, "OMP_NUM_THREADS": "1"}):  # a fork keeps no thread but its own
        _server.set_forkserver_preload([_PRELOAD])
        _server.ensure_running()
    _ours = (_server._forkserver_pid, noticed)
    util.Finalize(None, stop, exitpriority=-1)  # when this process ends, after it has ended its children


def stop() -> None:
    """End our server at once, imports or not; what was forked from it lives on."""
    global _ours
    if _ours is not None and _ours[0] == _server._forkserver_pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(_ours[0], signal.SIGKILL)
        _server._stop()
    _ours = None


def process_context(share: Callable[[Any, int], None]) -> context.BaseContext | None:
    """What starts a process of vLLM's here, in place of vLLM's own choice; None to leave it that.

    `share` is called in each forked process, with multiprocessing's `ForkServer` object and our server's process id; it
    makes the process start its own from there, too.
    """
    ours = _ours is not None and _ours == (_server._forkserver_pid, _noticed(os.environ))
    return _Context(share) if ours else None


def server_pid() -> int | None:
    """Process id of our server, if it was started."""
    return None if _ours is None else _ours[0]


class _Forked(context.ForkServerProcess):
    """A process that is born with its parent's environment and output, as one that is spawned."""

    share: Callable[[Any, int], None]

    def __reduce__(self) -> tuple[Any, ...]:
        handed_over = (dict(os.environ), DupFd(1), DupFd(2), _ours, self.share)
        return _born, handed_over, self.__dict__


class _Context(context.ForkServerContext):
    def __init__(self, share: Callable[[Any, int], None]) -> None:
        self._share = share

    def Process(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if len(cpu.openmp_cores(os.environ)) > 1:
            return context.SpawnProcess(*args, **kwargs)
        process = _Forked(*args, **kwargs)
        process.share = self._share
        return process


def _born(
    environ: Mapping[str, str],
    out: Any,
    err: Any,
    ours: tuple[int, dict[str, str]],
    share: Callable[[Any, int], None],
) -> _Forked:
    """First thing in a forked process; its target and arguments arrive after this."""
    global _ours
    os.environ.clear()
    os.environ.update(environ)
    for target, duplicate in ((1, out), (2, err)):
        given = duplicate.detach()
        os.dup2(given, target)
        os.close(given)
    _ours = ours
    share(_server, ours[0])
    if cores := cpu.openmp_cores(environ):
        import torch  # noqa: PLC0415  # it is there already

        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
    return _Forked.__new__(_Forked)


def _noticed(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(_NOTICED_ONCE)}
