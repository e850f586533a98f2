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
from pathlib import Path
from typing import Any

from titan_bridge.errors import BridgeError

_COLOR = "VLLM_LOGGING_COLOR"


@contextlib.contextmanager
def quiet(what: str, *, verbose: bool = False, hold: bool = False) -> Iterator[Callable[[], None]]:
    """Send everything that this process and its children print to a file, show the time that passes, and if the body
    fails, raise one line: a user's mistake as BridgeError, anything else as RuntimeError that names the file.

    Works on file descriptors, so that workers are covered. With `verbose` the log goes to stderr instead. The
    file is removed when the body succeeds.

    Args:
        what: what is being done, for the progress line on stderr.
        hold: show that line only once the function that this gives is called, so that an error before is alone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    log, path = tempfile.mkstemp(prefix="titan-bridge-", suffix=".log")
    ours = _COLOR not in os.environ
    if ours:
        os.environ[_COLOR] = "0"
    os.dup2(err if verbose else log, 1)
    if not verbose:
        os.dup2(log, 2)
    done = threading.Event()
    progress = threading.Thread(target=_progress, args=(what, err, done), daemon=True)

    def show() -> None:
        if not verbose and progress.ident is None:
            progress.start()

    if not hold:
        show()
    failure: BaseException | None = None
    try:
        yield show
    except BaseException as error:
        failure = error
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        done.set()
        if ours:
            os.environ.pop(_COLOR, None)
        if progress.ident is not None:
            progress.join()
        os.dup2(out, 1)
        os.dup2(err, 2)
        for descriptor in (out, err, log):
            os.close(descriptor)
        if verbose or failure is None or isinstance(failure, KeyboardInterrupt):
            os.unlink(path)
        if isinstance(failure, Exception):
            _explain(failure, path, verbose)


def _progress(what: str, descriptor: int, done: threading.Event) -> None:
    """A line that counts seconds on a terminal; one plain line elsewhere."""
    if not os.isatty(descriptor):
        os.write(descriptor, f"titan-bridge: {what}\n".encode())
        return
    started = time.monotonic()
    while not done.wait(0.2):
        os.write(descriptor, f"\r{what} {time.monotonic() - started:.0f} s ".encode())
    os.write(descriptor, b"\r\033[K")


def _explain(failure: Exception, path: str, verbose: bool) -> None:
    """Raise what the user should read in place of `failure`."""
    chain: BaseException | None = failure
    while chain is not None:
        if isinstance(chain, BridgeError):
            if not verbose:
                os.unlink(path)
            raise chain from None
        chain = chain.__cause__ or chain.__context__
    log = "" if verbose else Path(path).read_text(encoding="utf-8", errors="replace")
    if reason := user_error(f"{failure}\n{log}"):
        if not verbose:
            os.unlink(path)
        raise BridgeError(reason) from None
    if not verbose:
        raise RuntimeError(
            f"{last_error(log) or f'{type(failure).__name__}: {failure}'} (log: {path})"
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
