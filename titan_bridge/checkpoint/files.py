"""Reading parts of files: names that must stay inside a directory, and positioned reads into bounded buffers.

Files are read with pread, not mapped: a file that shrinks under a mapping kills the process, and mapped pages
count as memory of the process. Here it is a short read and an error.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from titan_bridge.errors import BridgeError

SCRATCH_BYTES = 2 << 20
"""Most bytes read in one go where the destination does not lie as the source does; one buffer a thread. What is cut
out of it should still lie in a core's cache, and a large buffer's first use costs more than the calls it saves."""
GAP_BYTES = 16 << 10
"""Unwanted bytes between wanted ones that are read along: another read costs as much."""
_OPEN_FILES = 64

Window = tuple[tuple[int, ...], tuple[int, ...], int]
"""(size, stride, offset) in elements of a contiguous tensor in a file."""


def inside(directory: Path, name: object, what: str) -> Path:
    """`directory / name`, refused unless it is a plain relative path that stays in the directory.

    Raises:
        BridgeError: Not a string, empty, absolute, with `..`, with a NUL, or with a backslash.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise BridgeError(f"{what} names the file {name!r}; it must be a relative path inside {directory}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise BridgeError(f"{what} names the file {name!r}, which is outside {directory}; refused")
    return directory / path


def read_bytes(path: Path, offset: int, length: int) -> bytes:
    """`length` bytes at `offset`. Raises BridgeError when the file has fewer or cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
    except (OSError, OverflowError, ValueError) as error:
        raise BridgeError(f"{path} cannot be read: {error}") from None
    if len(data) != length:
        raise BridgeError(
            f"{path} ends at byte {offset + len(data)}; {offset + length} were expected: truncated?"
        )
    return data


def size_of(path: Path) -> int:
    """Bytes of a file. Raises BridgeError when it is not there."""
    try:
        return path.stat().st_size
    except (OSError, ValueError) as error:
        raise BridgeError(f"{path} cannot be read: {error}") from None


class FilePool:
    """Open files, closed again when there are many; counts the bytes that were read. Usable from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._users: dict[Path, int] = {}
        self._scratch = threading.local()
        self.bytes_read = 0
        """Bytes that came from the files so far, small gaps between wanted ones included."""
        self.bytes_wanted = 0
        """Bytes that were asked for."""

    def close(self) -> None:
        """Close every file; the pool opens them again when it is used again."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def read_into(self, path: Path, offset: int, out: memoryview) -> None:
        """Fill `out` (bytes) from `offset` on. Raises BridgeError for a file that ends before."""
        descriptor = self._take(path)
        try:
            done, length = 0, out.nbytes
            while done < length:
                count = os.preadv(descriptor, [out[done:]], offset + done)
                if count == 0:
                    raise BridgeError(
                        f"{path} ends at byte {offset + done}; {offset + length} were expected: truncated?"
                    )
                done += count
        except OSError as error:
            raise BridgeError(f"{path} cannot be read: {error}") from None
        finally:
            self._give_back(path)
        with self._lock:
            self.bytes_read += out.nbytes

    def fetch(self, path: Path, base: int, dtype: torch.dtype, window: Window, out: torch.Tensor) -> None:
        """Copy a window of a contiguous tensor in a file into `out`, casting to its dtype.

        Args:
            base: Byte where the tensor starts in the file; need not be aligned.
            dtype: Of the tensor in the file.
            window: What to read, in elements.
            out: As large as the window (`window.size`), any strides.
        """
        size, stride, offset = window
        if not math.prod(size):
            return
        width = dtype.itemsize
        with self._lock:
            self.bytes_wanted += math.prod(size) * width
        dense = _is_row_major(size, stride)
        if dense and out.dtype == dtype and out.is_contiguous() and out.device.type == "cpu":
            self.read_into(path, base + offset * width, bytes_of(out))
            return
        for part, index in _readable(size, stride, offset, SCRATCH_BYTES // width, GAP_BYTES // width):
            low, length = part[2], _hull(part[0], part[1])
            buffer = self._buffer()[: length * width]
            self.read_into(path, base + low * width, bytes_of(buffer))
            typed = buffer.view(dtype)
            out[index].copy_(typed.as_strided(part[0], part[1]))

    def _buffer(self) -> torch.Tensor:
        if not hasattr(self._scratch, "buffer"):
            self._scratch.buffer = torch.empty(SCRATCH_BYTES, dtype=torch.uint8)
        return self._scratch.buffer

    def _take(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                try:
                    self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise BridgeError(f"{path} cannot be read: {error}") from None
            self._files.move_to_end(path)
            self._users[path] = self._users.get(path, 0) + 1
            for old in [p for p in self._files if not self._users.get(p)][
                : max(0, len(self._files) - _OPEN_FILES)
            ]:
                os.close(self._files.pop(old))
            return self._files[path]

    def _give_back(self, path: Path) -> None:
        with self._lock:
            self._users[path] -= 1
            if not self._users[path]:
                del self._users[path]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, shared."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _hull(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a window."""
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


def _is_row_major(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for n, s in zip(reversed(size), reversed(stride), strict=True):
        if n != 1:
            if s != step:
                return False
            step *= n
    return True


def _run(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements that lie together without a gap."""
    step = 1
    for s, n in sorted(zip(stride, size, strict=True)):
        if n > 1:
            if s != step:
                break
            step *= n
    return step


def _readable(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int, limit: int, gap: int
) -> Iterator[tuple[Window, tuple[slice, ...]]]:
    """The window in parts that are worth one read each, with their places in it.

    A part has at most `limit` elements from end to end, and at most `gap` elements on average between the runs that
    are wanted of it.
    """
    hull, wanted = _hull(size, stride), math.prod(size)
    sparse = hull - wanted > gap * (wanted // _run(size, stride))
    if hull <= limit and not sparse:
        yield (size, stride, offset), tuple(slice(0, n) for n in size)
        return
    widest = max((d for d in range(len(size)) if size[d] > 1), key=lambda d: stride[d])
    inner = _hull((*size[:widest], 1, *size[widest + 1 :]), stride)
    step = max(1, (limit - inner) // stride[widest]) if not sparse else 1
    for first in range(0, size[widest], step):
        count = min(step, size[widest] - first)
        part = (*size[:widest], count, *size[widest + 1 :])
        for window, index in _readable(part, stride, offset + first * stride[widest], limit, gap):
            at = index[widest]
            moved = slice(first + at.start, first + at.stop)
            yield window, (*index[:widest], moved, *index[widest + 1 :])
