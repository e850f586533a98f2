"""Execute a plan: strip by strip, each read, cast, looked at for NaN, and written, once.

A strip is a few megabytes of one destination tensor, put together in a buffer from wherever the source has it. So the
memory is a few buffers for each worker, whatever the size of the model, and both sides see large accesses.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from zlib_ng import zlib_ng

from titan_bridge.checkpoint.files import SCRATCH_BYTES, SPAN_BYTES, bytes_of
from titan_bridge.checkpoint.finite import count_not_finite
from titan_bridge.checkpoint.staging import PART, FileResult, Staging, disk_error
from titan_bridge.checkpoint.target import STRIP_BYTES, OutFile, Strip, copies_of
from titan_bridge.sharding.moves import Copy, Window, cut

if TYPE_CHECKING:
    from titan_bridge.checkpoint.job import Job

WORKER_BYTES = STRIP_BYTES + SCRATCH_BYTES + SPAN_BYTES
"""Memory of one worker: a strip, and the buffers of reads."""
_PIECE_BYTES = 512 << 10
"""What is read, looked at and written before the next, so that it lies in a core's cache meanwhile: two thirds of the
processor time of whole strips. Most bytes of one write, too: where a host takes free memory back, writes of 2 MB and
more were measured four to twelve times as slow; it seems that Linux fills pages of 2 MB for them, which it lacks."""
Progress = Callable[[int], None]  # told of bytes, from any thread
_Span = tuple[int, int, int]  # what was written: (offset, length, CRC-32)
_Fill = Callable[[torch.Tensor], None]


@contextlib.contextmanager
def strip_workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that work on a strip each; meanwhile torch has no threads of its own beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, thread_name_prefix="strips") as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A file that is being written."""

    file: OutFile
    descriptor: int
    copies: Mapping[Strip, Sequence[Copy]]


class Executor:
    """Writes files of a job into a staging directory, one after the other."""

    def __init__(self, job: Job, staging: Staging, files: Sequence[OutFile], advance: Progress) -> None:
        """`files`: those of this process that are not done yet. `advance` is told of bytes written."""
        self._job, self._staging, self._files, self._advance = job, staging, files, advance
        self._strips = {tensor.name: tensor for tensor in job.target.tensors()}
        self._buffers = threading.local()

    def run(self) -> list[FileResult]:
        """Write everything; returns what is known of each file.
        Raises BridgeError: the disk is full, a source file ends early, or anything else that the user can put right."""
        try:
            with strip_workers(self._job.options.workers) as pool:
                return [self._write_file(file, pool) for file in self._files]
        except OSError as error:
            raise disk_error(error, self._staging.path) from None

    def _write_file(self, file: OutFile, pool: ThreadPoolExecutor) -> FileResult:
        with (self._staging.path / (file.name + PART)).open("wb", buffering=0) as part:
            if file.size:
                os.posix_fallocate(part.fileno(), 0, file.size)  # a full disk shows now, not after hours
            opened = _Open(file=file, descriptor=part.fileno(), copies=copies_of(self._job.plan, file.name))
            written = list(pool.map(partial(self._write_strip, opened), file.strips))
            spans = self._frame(opened, [span for span, _ in written])
        counts: dict[str, dict[str, int]] = {"nan": {}, "inf": {}, "overflow": {}}
        for (name, _), (_, found) in zip(file.strips, written, strict=True):
            for what, count in found.items():
                if count:
                    counts[what][name] = counts[what].get(name, 0) + count
        result = FileResult(file=file.name, crc=_combined(sorted(spans)), counts=counts)
        self._staging.finish(result, self._job.team.rank, fsync=self._job.options.fsync)
        return result

    def _write_strip(self, opened: _Open, strip: Strip) -> tuple[_Span, Counter[str]]:
        """Returns what was written, and its elements that are not finite, by what they are."""
        tensor = self._strips[strip[0]]
        chunk = tensor.chunks[strip[1]]
        if not hasattr(self._buffers, "strip"):
            self._buffers.strip = torch.empty(STRIP_BYTES, dtype=torch.uint8)
        length, crc, counts = 0, 0, Counter[str]()
        for elements, fill in self._pieces(opened, strip, tensor.dtype.itemsize):
            values = self._buffers.strip[: elements * tensor.dtype.itemsize].view(tensor.dtype)
            fill(values)
            counts.update(_not_finite(values, fill))
            _, count, own = self._write(opened, chunk.offset + length, bytes_of(values))
            length, crc = length + count, zlib_ng.crc32_combine(crc, own, count)
        return (chunk.offset, length, crc), counts

    def _pieces(self, opened: _Open, strip: Strip, width: int) -> Iterator[tuple[int, _Fill]]:
        """A strip in pieces, one after the other: how many elements, and what fills a buffer of any dtype with them.
        `width`: bytes of an element of the strip."""
        elements, copies = self._strips[strip[0]].chunks[strip[1]].box.numel, opened.copies.get(strip, ())
        if len(copies) == 1 and copies[0].elements == elements:
            window, to = copies[0].source_window, copies[0].destination_window
            if window.order[:1] == to.order[:1]:  # else a piece of the strip lies scattered in the source
                source = partial(self._job.source.fetch_window, *self._job.source.source_of(copies[0]))
                for index in cut(to.size, to.order, _PIECE_BYTES // width):
                    part = replace(to.at(index), offset=0)
                    yield math.prod(part.size), partial(_fetch, source, window.at(index), part)
                return
        yield elements, partial(self._fill, strip, copies)

    def _fill(self, strip: Strip, copies: Iterable[Copy], buffer: torch.Tensor) -> None:
        if strip[0] in self._job.tensors.zero:
            buffer.zero_()
        for copy in copies:
            self._job.source.fetch(copy, copy.destination_window.of(buffer))

    def _frame(self, opened: _Open, weights: Sequence[_Span]) -> list[_Span]:
        """Write everything but the weights; returns all spans of the file."""
        spans, weights = list(weights), sorted(weights)
        starts = [offset for offset, _, _ in weights]
        for offset, data in opened.file.fixed:
            spans.append(self._write(opened, offset, memoryview(data)))
        for start, archive in opened.file.archives:
            first = start + archive.head_bytes
            last = first + archive.data_bytes
            crc = _combined(weights[bisect.bisect_left(starts, first) : bisect.bisect_left(starts, last)])
            for offset, data in zip((start, last), archive.frame(crc), strict=True):
                spans.append(self._write(opened, offset, memoryview(data)))
        return spans

    def _write(self, opened: _Open, offset: int, data: memoryview) -> _Span:
        done = 0
        while done < data.nbytes:
            done += os.pwrite(opened.descriptor, data[done : done + _PIECE_BYTES], offset + done)
        self._advance(data.nbytes)
        return offset, data.nbytes, zlib_ng.crc32(data)


def _fetch(
    source: Callable[[Window, torch.Tensor], None], window: Window, to: Window, buffer: torch.Tensor
) -> None:
    source(window, to.of(buffer))


def _not_finite(values: torch.Tensor, fill: _Fill) -> dict[str, int]:
    """NaN, infinity, and what became infinite when it was cast. `fill` puts the same elements into another buffer."""
    (nan, inf), overflow = count_not_finite(values), 0
    if inf:
        fill(uncast := torch.empty(values.numel(), dtype=torch.float64))
        overflow = inf - int(uncast.isinf().sum())
    return {"nan": nan, "inf": inf, "overflow": overflow}


def _combined(spans: Iterable[_Span]) -> int:
    """The CRC-32 of spans that lie one after the other."""
    crc = 0
    for _, length, own in spans:
        crc = zlib_ng.crc32_combine(crc, own, length)
    return crc
