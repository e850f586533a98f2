"""Writing large files: past the page cache where that is quicker.

A direct write needs no memory for pages that nobody reads again, and pushes out none that somebody does. Whether it is
quicker depends on the machine: five times where new pages are dear (a virtual machine whose host takes free memory
back), slower where much memory hides a slow disk. So both ways are tried, and the quicker one goes on.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from pathlib import Path

import numpy as np
import torch

PAGE = mmap.PAGESIZE
"""Direct writes start at multiples of it, in the file and in memory."""
PIECE_BYTES = 4 << 20
"""Bytes of one direct write, and of what is timed."""
_LEAST = 1 << 20
"""Less is not worth a direct write."""
_CALL_BYTES = 512 << 10
"""Most bytes of one write through the page cache. Where a host takes free memory back, those of 2 MB and more were
measured four to twelve times as slow: it seems that Linux fills pages of 2 MB for them, which are then new ones."""
_FIRST_TRIAL, _LAST_TRIAL = 8, 256
"""Pieces between two trials of the slower way; it doubles while the slower one stays the slower."""
_bounce = threading.local()
"""For each thread, memory that starts at a page, for pieces that do not."""


def aligned(count: int) -> torch.Tensor:
    """`count` bytes of memory that start at a page."""
    return torch.frombuffer(mmap.mmap(-1, max(count, 1)), dtype=torch.uint8)[:count]


class Pace:
    """Which way of writing is quicker, by what the last pieces took. Shared by all files and threads of a run."""

    def __init__(self, *, direct: bool | None = None) -> None:
        """`direct`: one way for good; None finds out."""
        self._lock = threading.Lock()
        self._only = direct
        self._rates: dict[bool, float] = {}
        self._left = self._gap = _FIRST_TRIAL

    @property
    def tries_direct(self) -> bool:
        """Whether any piece may go past the page cache."""
        return self._only is not False

    def direct(self) -> bool:
        """Whether the next piece goes past the page cache."""
        with self._lock:
            if self._only is not None:
                return self._only
            for way in (True, False):
                if way not in self._rates:
                    return way
            quicker = self._rates[True] > self._rates[False]
            self._left -= 1
            if self._left > 0:
                return quicker
            self._gap = min(2 * self._gap, _LAST_TRIAL)
            self._left = self._gap
            return not quicker

    def took(self, direct: bool, count: int, seconds: float) -> None:
        """A piece of `count` bytes took `seconds`."""
        with self._lock:
            rate = count / max(seconds, 1e-9)
            quicker = max(self._rates, key=self._rates.__getitem__) if len(self._rates) == 2 else None
            self._rates[direct] = (self._rates.get(direct, rate) + rate) / 2
            if quicker is not None and self._rates[not quicker] > self._rates[quicker]:
                self._left = self._gap = _FIRST_TRIAL

    def refused(self) -> None:
        """The file system writes through the page cache only."""
        with self._lock:
            self._only = False


class OutputFile:
    """A new file of a known size, written in any order by several threads."""

    def __init__(self, path: Path, size: int, pace: Pace) -> None:
        """Raises OSError, for instance when the disk cannot take `size` bytes."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._pace = pace
        self._descriptor = os.open(path, flags | os.O_TRUNC, 0o644)
        self._direct: int | None = None
        try:
            if size:
                # A full disk shows now, not after hours; and blocks that are there already are cheaper to write to.
                os.posix_fallocate(self._descriptor, 0, size)
            if size >= _LEAST and pace.tries_direct:
                self._direct = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                os.close(self._descriptor)
                raise
            pace.refused()

    def close(self) -> None:
        """Close it; nothing is forced onto the disk. May be called twice."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._descriptor, self._direct = -1, None

    def write(self, offset: int, data: memoryview) -> None:
        """Write contiguous bytes. Quickest where `data` lies in memory as in the file, by pages."""
        if self._direct is None or data.nbytes < _LEAST:
            self._buffered(offset, data)
            return
        first = -offset % PAGE
        last = first + (data.nbytes - first) // PAGE * PAGE
        self._buffered(offset, data[:first])
        for at in range(first, last, PIECE_BYTES):
            piece = data[at : min(at + PIECE_BYTES, last)]
            direct = self._pace.direct()
            began = time.perf_counter()
            if direct:
                self._past_cache(offset + at, piece)
            else:
                self._buffered(offset + at, piece)
            self._pace.took(direct, piece.nbytes, time.perf_counter() - began)
        self._buffered(offset + last, data[last:])

    def _buffered(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < data.nbytes:
            done += os.pwrite(self._descriptor, data[done : done + _CALL_BYTES], offset + done)

    def _past_cache(self, offset: int, piece: memoryview) -> None:
        assert self._direct is not None
        if np.frombuffer(piece, np.uint8).ctypes.data % PAGE:
            if not hasattr(_bounce, "buffer"):
                _bounce.buffer = memoryview(mmap.mmap(-1, PIECE_BYTES))
            _bounce.buffer[: piece.nbytes] = piece
            piece = _bounce.buffer[: piece.nbytes]
        try:
            done = os.pwrite(self._direct, piece, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._pace.refused()
            done = 0
        self._buffered(offset + done, piece[done:])
