"""Execute a plan: strip by strip, each read, cast, looked at for NaN, and written, once.

A strip is a few megabytes of one destination tensor, put together in a buffer from wherever the source has it. So the
memory is a few buffers for each worker, whatever the size of the model, and both sides see large accesses.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from zlib_ng import zlib_ng

from titan_bridge.checkpoint.files import SCRATCH_BYTES, SPAN_BYTES
from titan_bridge.checkpoint.finite import count_not_finite
from titan_bridge.checkpoint.staging import PART, FileResult, Staging, disk_error
from titan_bridge.checkpoint.target import STRIP_BYTES, OutFile, Strip, copies_of
from titan_bridge.memory import bytes_of
from titan_bridge.sharding.moves import Copy

if TYPE_CHECKING:
    from titan_bridge.checkpoint.job import Job

WORKER_BYTES = STRIP_BYTES + SCRATCH_BYTES + SPAN_BYTES
"""Memory of one worker: a strip, and the buffers of reads."""
_CALL_BYTES = 512 << 10
"""Most bytes of one write. Where a host takes free memory back, those of 2 MB and more were measured four to twelve
times as slow: it seems that Linux fills pages of 2 MB for them, which are then new ones."""
Progress = Callable[[int], None]  # told of bytes, from any thread
_Span = tuple[int, int, int]  # what was written: (offset, length, CRC-32)


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
class _Writing:
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
            opened = _Writing(
                file=file, descriptor=part.fileno(), copies=copies_of(self._job.plan, file.name)
            )
            futures = [pool.submit(self._write_strip, opened, strip) for strip in file.strips]
            try:
                written = [future.result() for future in futures]
            finally:  # no strip goes to a descriptor that is closed, or by then another file's
                for future in futures:
                    future.cancel()
                wait(futures)
            spans = self._frame(opened, [span for span, _ in written])
        counts: dict[str, dict[str, int]] = {"nan": {}, "inf": {}, "overflow": {}}
        for (name, _), (_, found) in zip(file.strips, written, strict=True):
            for what, count in found.items():
                counts[what][name] = counts[what].get(name, 0) + count
        result = FileResult(file=file.name, crc=_combined(sorted(spans)), counts=counts)
        self._staging.finish(result, self._job.team.rank, fsync=self._job.options.fsync)
        return result

    def _write_strip(self, opened: _Writing, strip: Strip) -> tuple[_Span, dict[str, int]]:
        """Returns what was written, and its elements that are not finite, by what they are."""
        tensor = self._strips[strip[0]]
        chunk = tensor.chunks[strip[1]]
        if not hasattr(self._buffers, "strip"):
            self._buffers.strip = torch.empty(STRIP_BYTES, dtype=torch.uint8)
        buffer = self._buffers.strip[: chunk.box.numel * tensor.dtype.itemsize].view(tensor.dtype)
        self._fill(opened, strip, buffer)
        counts = self._count(opened, strip, buffer)
        return self._write(opened, chunk.offset, bytes_of(buffer)), counts

    def _fill(self, opened: _Writing, strip: Strip, buffer: torch.Tensor) -> None:
        """Read a strip into a buffer of as many elements, of any dtype."""
        if strip[0] in self._job.tensors.zero:
            buffer.zero_()
        for copy in opened.copies.get(strip, ()):
            self._job.source.fetch(copy, copy.destination_window.of(buffer))

    def _count(self, opened: _Writing, strip: Strip, values: torch.Tensor) -> dict[str, int]:
        """NaN, infinity, and what became infinite when it was cast, where there is any."""
        (nan, inf), overflow = count_not_finite(values), 0
        if inf:
            uncast = torch.empty(values.numel(), dtype=torch.float64)
            self._fill(opened, strip, uncast)
            overflow = inf - int(uncast.isinf().sum())
        counts = {"nan": nan, "inf": inf, "overflow": overflow}
        return {what: count for what, count in counts.items() if count}

    def _frame(self, opened: _Writing, weights: Sequence[_Span]) -> list[_Span]:
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

    def _write(self, opened: _Writing, offset: int, data: memoryview) -> _Span:
        crc = done = 0
        while done < data.nbytes:
            part = data[done : done + _CALL_BYTES]
            crc = zlib_ng.crc32(part, crc)  # brings it into the core's cache
            while part.nbytes:
                count = os.pwrite(opened.descriptor, part, offset + done)
                part, done = part[count:], done + count
        self._advance(data.nbytes)
        return offset, data.nbytes, crc


def _combined(spans: Iterable[_Span]) -> int:
    """The CRC-32 of spans that lie one after the other."""
    crc = 0
    for _, length, own in spans:
        crc = zlib_ng.crc32_combine(crc, own, length)
    return crc
