"""Reading parts of files: names that must stay inside a directory, and positioned reads into bounded buffers.

Files are read with pread, not mapped: a file that shrinks under a mapping kills the process, and mapped pages
count as memory of the process. Here it is a short read and an error. Many short runs that lie near each other, as the
rows of a column slice do, are the exception, where a call each costs more than the bytes: a few megabytes are mapped
for the moment in which they are copied, after the kernel said that it has all of them.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.moves import row_major

SCRATCH_BYTES = 2 << 20
"""Most bytes read in one go where the destination does not lie as the source does; one buffer a thread. What is copied
out of it should still lie in a core's cache, and a large buffer's first use costs more than the calls it saves."""
NEAR_BYTES = 128 << 10
"""Most bytes between runs that are mapped together: a disk reads through such a gap faster than it finds its end."""
SPAN_BYTES = 32 << 20
"""Most bytes from the first to the last one of what is read in one go: pages that are mapped count as memory."""
_POPULATE_READ = 22
"""MADV_POPULATE_READ (Linux 5.14): fails where a page cannot be had, instead of killing whoever touches it."""
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
        """Bytes of weights that came from the files so far."""

    def close(self) -> None:
        """Close every file; the pool opens them again when it is used again."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def read_into(self, path: Path, offset: int, out: memoryview) -> None:
        """Fill `out` (bytes) from `offset` on. Raises BridgeError for a file that ends before."""
        self._read_each(path, [offset], out)

    def header(self, path: Path, base: int, within: int, where: str, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` of the `within` bytes at `base`, which do not count as read.

        Raises BridgeError for more than there are, and for a file that ends before.
        """
        if offset < 0 or length < 0 or offset + length > within:
            raise BridgeError(f"{where}: damaged archive")
        buffer = bytearray(length)
        self._read_each(path, [base + offset], memoryview(buffer), counted=False)
        return bytes(buffer)

    def _read_each(self, path: Path, starts: Sequence[int], out: memoryview, *, counted: bool = True) -> None:
        """Fill `out` with as many bytes from each of `starts`, one after the other."""
        length = out.nbytes // len(starts)
        descriptor = self._take(path)
        try:
            for at, start in enumerate(starts):
                _read(descriptor, path, start, out[at * length : (at + 1) * length])
        except OSError as error:
            raise BridgeError(f"{path} cannot be read: {error}") from None
        finally:
            self._give_back(path)
        if counted:
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
        width = dtype.itemsize
        if not math.prod(size):
            return
        as_it_lies = out.dtype == dtype and out.is_contiguous() and out.device.type == "cpu"
        if as_it_lies and row_major(size, stride):
            self.read_into(path, base + offset * width, bytes_of(out))
            return
        for part, index in _parts(size, stride, offset, SCRATCH_BYTES // width, SPAN_BYTES // width):
            if self._copy_mapped(path, base, dtype, part, out[index]):
                continue
            buffer = self._buffer()[: math.prod(part[0]) * width]
            starts = _starts(*part).mul_(width).add_(base).tolist()
            self._read_each(path, starts, bytes_of(buffer))
            out[index].copy_(buffer.view(dtype).as_strided(part[0], _packed(part[0], part[1])))

    def _copy_mapped(
        self, path: Path, base: int, dtype: torch.dtype, window: Window, out: torch.Tensor
    ) -> bool:
        """Copy a window of several runs that lie near each other; False where it is not one, or cannot be mapped."""
        (size, stride, offset), width = window, dtype.itemsize
        hull, wanted = _hull(size, stride), math.prod(size)
        gaps = wanted // _run(size, stride) - 1
        if not gaps or (hull - wanted) * width > gaps * NEAR_BYTES or base % width:
            return False
        first = base + offset * width
        ahead = first % mmap.ALLOCATIONGRANULARITY
        descriptor = self._take(path)
        try:
            # Writable, since torch warns of memory that is not; private, so that nothing could be written.
            mapped = mmap.mmap(
                descriptor, ahead + hull * width, access=mmap.ACCESS_COPY, offset=first - ahead
            )
            mapped.madvise(_POPULATE_READ)
        except (OSError, ValueError):  # an older kernel, or a file that ends early: a read says which
            return False
        finally:
            self._give_back(path)
        flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=ahead, count=hull * width).view(dtype)
        out.copy_(flat.as_strided(size, stride))
        with self._lock:
            self.bytes_read += wanted * width
        return True

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


def _read(descriptor: int, path: Path, offset: int, out: memoryview) -> None:
    done, length = 0, out.nbytes
    while done < length:
        count = os.preadv(descriptor, [out[done:]], offset + done)
        if count == 0:
            raise BridgeError(
                f"{path} ends at byte {offset + done}; {offset + length} were expected: truncated?"
            )
        done += count


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, shared."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _hull(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a window."""
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


def _packed(size: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    """Strides of the window without its gaps, its runs one after the other."""
    result, step = [0] * len(size), 1
    for dim in sorted(range(len(size)), key=lambda d: stride[d]):
        result[dim] = step
        step *= size[dim]
    return result


def _run(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements that lie together without a gap."""
    step = 1
    for s, n in sorted(zip(stride, size, strict=True)):
        if n > 1:
            if s != step:
                break
            step *= n
    return step


def _starts(size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> torch.Tensor:
    """Where the runs of a window start, in elements, forwards."""
    run = _run(size, stride)
    starts, inner = torch.tensor([offset]), 1
    for s, n in sorted(zip(stride, size, strict=True)):
        if n > 1 and inner >= run:
            starts = (torch.arange(n)[:, None] * s + starts).view(-1)
        inner *= n
    return starts


def _parts(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int, limit: int, span: int
) -> Iterator[tuple[Window, tuple[slice, ...]]]:
    """The window in parts of at most `limit` elements that lie within `span`, forwards, with their places in it."""
    wanted = math.prod(size)
    if wanted == 1 or (wanted <= limit and _hull(size, stride) <= span):
        yield (size, stride, offset), tuple(slice(0, n) for n in size)
        return
    widest = max((d for d in range(len(size)) if size[d] > 1), key=lambda d: stride[d])
    step = max(1, min(limit // (wanted // size[widest]), span // stride[widest]))
    for first in range(0, size[widest], step):
        count = min(step, size[widest] - first)
        part = (*size[:widest], count, *size[widest + 1 :])
        for window, index in _parts(part, stride, offset + first * stride[widest], limit, span):
            at = index[widest]
            moved = slice(first + at.start, first + at.stop)
            yield window, (*index[:widest], moved, *index[widest + 1 :])
