"""Keep what vLLM's processes print out of a command's own output, and find the reason in it when they fail."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from titan_bridge.errors import BridgeError

_COLOR = "VLLM_LOGGING_COLOR"

STAGES = {
    "Initializing a V1 LLM engine": "starting the workers",
    "Starting to load model": "building the model and reading its weights",
    "on this rank": "reserving the cache and warming up",
    "init engine (": "generating",
}
"""What vLLM and our loader log when a stage of a start begins, in their order -> what the progress line says then."""


class Progress:
    """A line on stderr that counts seconds on a terminal; elsewhere one plain line a stage.

    Shown from the first call on, so that an error before is alone.
    """

    def __init__(self, descriptor: int, log: int) -> None:
        """`descriptor` is written to; `log` is a file whose growing text tells the stages of a start."""
        self._descriptor, self._log = descriptor, log
        self._terminal = os.isatty(descriptor)
        self._what, self._stages, self._at = "", list(STAGES), 0
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __call__(self, what: str) -> None:
        """From now on this is being done."""
        with self._lock:
            self._what = what
            if not self._terminal:
                os.write(self._descriptor, f"titan-bridge: {what}\n".encode())
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        """Take the line away."""
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        while not self._done.wait(0.2):
            self._read_log()
            if self._terminal:
                line = f"\r\033[K{self._what} {time.monotonic() - started:.0f} s "
                os.write(self._descriptor, line.encode())
        if self._terminal:
            os.write(self._descriptor, b"\r\033[K")

    def _read_log(self) -> None:
        new = os.pread(self._log, 1 << 20, self._at)
        new = new[: new.rfind(b"\n") + 1]  # an unfinished line is read again
        self._at += len(new)
        begun = [stage for stage in self._stages if stage.encode() in new]
        if begun:
            self._stages = self._stages[self._stages.index(begun[-1]) + 1 :]
            self(STAGES[begun[-1]])


@contextlib.contextmanager
def quiet(*, verbose: bool = False) -> Iterator[Callable[[str], None]]:
    """Send everything that this process and its children print to a file, show what is being done, and if the body
    fails, raise one line: a user's mistake as BridgeError, anything else as RuntimeError that names the file.

    Works on file descriptors, so that workers are covered. With `verbose` the log goes to stderr instead. The file
    stays only where an error names it.

    Yields:
        A function that says what is being done from now on; nothing is shown before it is called.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    ours = _COLOR not in os.environ
    if ours:
        os.environ[_COLOR] = "0"
    with tempfile.TemporaryFile() as log:  # without a name, so that no way to end leaves it
        os.dup2(err if verbose else log.fileno(), 1)
        if not verbose:
            os.dup2(log.fileno(), 2)
        progress = Progress(err, log.fileno())
        failure: Exception | None = None
        try:
            yield (lambda what: None) if verbose else progress
        except Exception as error:
            failure = error
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if ours:
                os.environ.pop(_COLOR, None)
            progress.stop()
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.close(out)
            os.close(err)
        if failure is not None:
            size = os.fstat(log.fileno()).st_size
            _explain(failure, None if verbose else os.pread(log.fileno(), size, 0))


def _explain(failure: Exception, log: bytes | None) -> NoReturn:
    """Raise what the user should read in place of `failure`; `log` is None where the user has seen it."""
    chain: BaseException | None = failure
    while chain is not None:
        if isinstance(chain, BridgeError):
            raise chain from None
        chain = chain.__cause__ or chain.__context__
    text = (log or b"").decode(errors="replace")
    if reason := user_error(f"{failure}\n{text}"):
        raise BridgeError(reason) from None
    if log is None:
        raise failure
    descriptor, path = tempfile.mkstemp(prefix="titan-bridge-", suffix=".log")
    with open(descriptor, "wb") as file:
        file.write(log)
    raise RuntimeError(
        f"{last_error(text) or f'{type(failure).__name__}: {failure}'} (log: {path})"
    ) from failure


def warn_of_weights(workers: Sequence[Mapping[str, Any]]) -> None:
    """Say on stderr which weights are NaN or infinite, which vLLM's log says, too; `workers`: their reports."""
    from titan_bridge.checkpoint.finite import not_finite_lines  # torch

    nan: Counter[str] = Counter()
    inf: Counter[str] = Counter()
    for loaded in (worker["loaded"] for worker in workers if worker["loaded"]):
        nan |= Counter(loaded["nan"])  # the larger one: ranks hold a weight in parts, or each all of it
        inf |= Counter(loaded["inf"])
    for line in not_finite_lines(nan, inf):
        print(f"titan-bridge: {line}", file=sys.stderr)


def user_error(log: str) -> str | None:
    """The first message of one of our errors in a log of vLLM's, or in the text of pydantic's ValidationError."""
    found = re.search(r"BridgeError: (.+)|UnsupportedModelError: (.+)", log)
    if found:
        return (found[1] or found[2]).strip()
    wrapped = re.search(r"Value error, (.+?) \[type=value_error", log, re.DOTALL)
    return " ".join(wrapped[1].split()) if wrapped else None


def last_error(log: str) -> str | None:
    """The line of the first exception that a traceback in the log ends with, as the likeliest root cause."""
    names = re.findall(r"^(?:.*?\] |\(.*?\) )*((?:\w+\.)*\w*(?:Error|Exception)\b: .+)$", log, re.MULTILINE)
    return names[0].strip() if names else None
