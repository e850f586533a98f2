"""Reading parts of files: names that must stay inside a directory, and positioned reads into bounded buffers.

Files are read with pread: a file that shrinks under a mapping kills the process, and mapped pages count as memory of
the process. Many short runs near each other are the exception: a few megabytes are mapped for the moment in which they
are copied, after the kernel said that it has all of them.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import torch

from titan_bridge.errors import BridgeError
from titan_bridge.memory import bytes_of
from titan_bridge.sharding.moves import Window, cut, row_major

SCRATCH_BYTES = 2 << 20
"""Most bytes read in one go where the destination does not lie as the source does; one buffer a thread. What is copied
out of it should still lie in a core's cache, and a large buffer's first use costs more than the calls it saves."""
NEAR_BYTES = 16 << 10
"""Runs with no more between them, as the rows of a column slice, are mapped together: for runs of 1 to 6 KB this takes
half the time of a read each, or of reading the gaps, too; from 64 KB on there is no difference."""
SPAN_BYTES = 4 << 20  # most bytes that are mapped at a time: they count as memory
_POPULATE_READ = 22
"""MADV_POPULATE_READ (Linux 5.14): fails where a page cannot be had, instead of killing whoever touches it."""
_OPEN_FILES = 64


def inside(directory: Path, name: object, what: str) -> Path:
    """`directory / name`. Raises BridgeError unless it is a plain relative path that stays in the directory."""
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
        raise _too_short(path, offset + len(data), offset + length)
    return data


def size_of(path: Path) -> int:
    """Bytes of a file. Raises BridgeError when it is not there."""
    try:
        return path.stat().st_size
    except (OSError, ValueError) as error:
        raise BridgeError(f"{path} cannot be read: {error}") from None


def _too_short(path: Path, end: int, wanted: int) -> BridgeError:
    return BridgeError(f"{path} ends at byte {end}; {wanted} were expected: truncated?")


class _Open:
    """A file's descriptor, closed when nobody has it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # kept: `os` may be gone at exit
        close(self.descriptor)


class _Scratch:
    """One thread's memory for bytes that cannot be read to where they go.
    For another device it is two buffers, pinned, so that one is filled while the other travels; dtype and strides are
    changed over there, since a copy that changes them leaves pinned memory. This has never run on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.staged, self.pinned = device, device.type != "cpu", device.type == "cuda"
        self._at = 0
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._gone: list[torch.Event | None] = [None, None]

    def take(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat buffer that nothing travels from; of two buffers they are taken in turns."""
        if self.staged:
            self._at = 1 - self._at
        if (gone := self._gone[self._at]) is not None:
            gone.synchronize()
        if (buffer := self._buffers[self._at]) is None:
            size = max(SCRATCH_BYTES, SPAN_BYTES) if self.staged else SCRATCH_BYTES
            buffer = self._buffers[self._at] = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        return buffer[: elements * dtype.itemsize].view(dtype)

    def put(self, taken: torch.Tensor, out: torch.Tensor) -> None:
        """Copy what was taken last, in any strides, to `out`; on a GPU it may be under way when this returns."""
        if self.staged:
            taken = taken.to(self.device, non_blocking=True)
        if self.pinned:
            self._gone[self._at] = torch.cuda.current_stream(self.device).record_event()
        out.copy_(taken)


class FilePool:
    """Open files, closed again when there are many; counts the bytes that were wanted. Usable from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[Path, _Open] = {}  # what was used last is last
        self._scratch = threading.local()
        self.bytes_read = 0
        """Bytes of weights that came from the files so far, without the gaps that were read with them."""

    def close(self) -> None:
        """Close every file; the pool opens them again when it is used again."""
        with self._lock:
            self._files.clear()

    def read_into(self, path: Path, offset: int, out: memoryview, *, counted: bool = True) -> None:
        """Fill `out` (bytes) from `offset` on. Raises BridgeError for a file that ends before."""
        self._read_each(path, [offset], out, out.nbytes if counted else 0)

    def part(self, path: Path, start: int, length: int) -> Callable[[int, int], bytes]:
        """Reads (offset, bytes) inside a part of a file, which are not counted."""

        def read(offset: int, count: int) -> bytes:
            if offset < 0 or count < 0 or offset + count > length:
                raise BridgeError("damaged archive")
            buffer = bytearray(count)
            self.read_into(path, start + offset, memoryview(buffer), counted=False)
            return bytes(buffer)

        return read

    def _read_each(self, path: Path, starts: Sequence[int], out: memoryview, wanted: int) -> None:
        """Fill `out` with as many bytes from each of `starts`, one after the other."""
        length = out.nbytes // len(starts)
        file = self._open(path)
        try:
            for first, start in enumerate(starts):
                done, part = 0, out[first * length : (first + 1) * length]
                while done < length:
                    if not (count := os.preadv(file.descriptor, [part[done:]], start + done)):
                        raise _too_short(path, start + done, start + length)
                    done += count
        except OSError as error:
            raise BridgeError(f"{path} cannot be read: {error}") from None
        with self._lock:
            self.bytes_read += wanted

    def fetch(self, path: Path, base: int, dtype: torch.dtype, window: Window, out: torch.Tensor) -> None:
        """Copy a window of a contiguous tensor in a file into `out` (as large as the window, any strides, any dtype).
        `base`: byte where the tensor (of `dtype`) starts in the file; need not be aligned."""
        width = dtype.itemsize
        if not math.prod(window.size):
            return
        scratch = self._scratch_for(out.device)
        as_it_lies = out.dtype == dtype and out.is_contiguous() and not scratch.staged
        if as_it_lies and window.is_run:
            self.read_into(path, base + window.offset * width, bytes_of(out))
            return
        near = _gap(window) * width <= NEAR_BYTES and base % width == 0
        most, stride = (SPAN_BYTES, window.stride) if near else (SCRATCH_BYTES, None)
        for index in cut(window.size, window.order, most // width, stride):
            part, to = window.at(index), out[index]
            if near and self._copy_mapped(path, base, dtype, part, to, scratch):
                continue
            for at in cut(part.size, part.order, SCRATCH_BYTES // width):
                run = part.at(at)
                packed, elements = _packed(run), math.prod(run.size)
                direct = as_it_lies and row_major(run.size, packed) and to[at].is_contiguous()
                buffer = to[at] if direct else scratch.take(elements, dtype)
                starts = [base + start * width for start in _starts(run)]
                self._read_each(path, starts, bytes_of(buffer), elements * width)
                if not direct:
                    scratch.put(buffer.as_strided(run.size, packed), to[at])

    def _copy_mapped(
        self, path: Path, base: int, dtype: torch.dtype, window: Window, out: torch.Tensor, scratch: _Scratch
    ) -> bool:
        """Copy a window out of mapped memory; False where it cannot be mapped."""
        width, span, first = dtype.itemsize, _span(window), base + window.offset * dtype.itemsize
        ahead = first % mmap.ALLOCATIONGRANULARITY
        file = self._open(path)
        try:
            # Writable, since torch warns of memory that is not; private, so that nothing could be written.
            length = ahead + span * width
            mapped = mmap.mmap(file.descriptor, length, access=mmap.ACCESS_COPY, offset=first - ahead)
            mapped.madvise(_POPULATE_READ)
        except (OSError, ValueError):  # an older kernel, or a file that ends early: a read says which
            return False
        flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=ahead, count=span * width).view(dtype)
        found = flat.as_strided(window.size, window.stride)
        if scratch.staged:
            found = scratch.take(found.numel(), dtype).view(found.shape).copy_(found)
        scratch.put(found, out)
        with self._lock:
            self.bytes_read += math.prod(window.size) * width
        return True

    def _scratch_for(self, device: torch.device) -> _Scratch:
        known: dict[torch.device, _Scratch] = self._scratch.__dict__.setdefault("by_device", {})
        if device not in known:
            known[device] = _Scratch(device)
        return known[device]

    def _open(self, path: Path) -> _Open:
        with self._lock:
            file = self._files.pop(path, None)
            try:
                self._files[path] = file or _Open(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise BridgeError(f"{path} cannot be read: {error}") from None
            if len(self._files) > _OPEN_FILES:
                del self._files[next(iter(self._files))]
            return self._files[path]


def _by_stride(window: Window) -> list[tuple[int, int]]:
    """(stride, size) of the dims that have more than one element, the innermost first."""
    return sorted((s, n) for s, n in zip(window.stride, window.size, strict=True) if n > 1)


def _span(window: Window) -> int:
    """Elements from the first to the last one of a window."""
    return 1 + sum((n - 1) * s for s, n in _by_stride(window))


def _run(window: Window) -> int:
    """Elements that lie together without a gap."""
    step = 1
    for s, n in _by_stride(window):
        if s != step:
            break
        step *= n
    return step


def _gap(window: Window) -> float:
    """Elements between two runs, on the average."""
    elements = math.prod(window.size)
    return (_span(window) - elements) / max(1, elements // _run(window) - 1)


def _starts(window: Window) -> list[int]:
    """Where the runs of a window start, in elements, forwards."""
    run, starts, inner = _run(window), torch.tensor([window.offset]), 1
    for s, n in _by_stride(window):
        if inner >= run:
            starts = (torch.arange(n)[:, None] * s + starts).view(-1)
        inner *= n
    return starts.tolist()


def _packed(window: Window) -> list[int]:
    """Strides of the window without its gaps, its runs one after the other."""
    result, step = [0] * len(window.size), 1
    for dim in sorted(range(len(window.size)), key=lambda d: window.stride[d]):
        result[dim] = step
        step *= window.size[dim]
    return result
