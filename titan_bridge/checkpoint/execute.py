"""Execute a plan: strip by strip, each read, cast, looked at for NaN, and written, once.

A strip is a few megabytes of one destination tensor, put together in a buffer from wherever the source has it. So the
memory is a few buffers for each worker, whatever the size of the model, and both sides see large accesses.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from zlib_ng import zlib_ng

from titan_bridge.checkpoint.files import SCRATCH_BYTES, SPAN_BYTES, bytes_of
from titan_bridge.checkpoint.finite import count_not_finite
from titan_bridge.checkpoint.staging import PART, FileResult, Staging, disk_error
from titan_bridge.checkpoint.target import STRIP_BYTES, OutFile, Strip, copies_of
from titan_bridge.sharding.moves import Copy

if TYPE_CHECKING:
    from titan_bridge.checkpoint.job import Job

WORKER_BYTES = STRIP_BYTES + SCRATCH_BYTES + SPAN_BYTES
"""Memory of one worker: a strip, and the buffers of reads."""
_BLOB_BYTES = 4 << 20
_CALL_BYTES = 512 << 10
"""Most bytes of one write. Where a host takes free memory back, those of 2 MB and more were measured four to twelve
times as slow: it seems that Linux fills pages of 2 MB for them, which are then new ones."""


@dataclass
class _Open:
    """A file that is being written."""

    file: OutFile
    descriptor: int
    copies: dict[Strip, list[Copy]]
    left: int
    written: list[tuple[int, int, int]] = field(default_factory=list)
    """(offset, length, CRC-32) of what was written."""
    counts: dict[str, dict[str, int]] = field(default_factory=lambda: {"nan": {}, "inf": {}, "overflow": {}})


class Executor:
    """Writes files of a job into a staging directory."""

    def __init__(
        self, job: Job, staging: Staging, files: Sequence[OutFile], advance: Callable[[int], None]
    ) -> None:
        """`files`: those of this process that are not done yet. `advance` is told of bytes written, from any thread."""
        self._job, self._staging, self._files, self._advance = job, staging, files, advance
        self._strips = {tensor.name: tensor for tensor in job.target.tensors()}
        self._workers = job.options.workers
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._buffers = threading.local()
        self._descriptors: set[int] = set()
        self._results: list[FileResult] = []

    def run(self) -> list[FileResult]:
        """Write everything; returns what is known of each file.

        Raises:
            BridgeError: The disk is full, a source file ends early, or anything else that the user can put right.
        """
        steps = self._steps()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the workers are the parallelism
        try:
            if self._workers == 1:
                self._drain(steps)
            else:
                with ThreadPoolExecutor(self._workers, thread_name_prefix="reshard") as pool:
                    futures = [pool.submit(self._drain, steps) for _ in range(self._workers)]
                    try:
                        for future in futures:
                            future.result()
                    finally:
                        self._stop.set()
        except OSError as error:
            raise disk_error(error, self._staging.path) from None
        finally:
            torch.set_num_threads(threads)
            for descriptor in self._descriptors:
                os.close(descriptor)
        return self._results

    def _steps(self) -> Iterator[tuple[_Open, Strip | None]]:
        """Files in turn, and of each file its strips in turn."""
        for file in self._files:
            opened = _Open(file, self._create(file), copies_of(self._job.plan, file), len(file.strips) + 1)
            yield opened, None  # blobs, and files without a strip
            for strip in file.strips:
                yield opened, strip

    def _drain(self, steps: Iterator[tuple[_Open, Strip | None]]) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    step = next(steps, None)
                if step is None:
                    return
                opened, strip = step
                if strip is None:
                    self._write_blobs(opened)
                else:
                    self._write_strip(opened, strip)
                with self._lock:
                    opened.left -= 1
                    last = opened.left == 0
                if last:
                    self._finish(opened)
        except BaseException:
            self._stop.set()
            raise

    def _create(self, file: OutFile) -> int:
        """Raises OSError, for instance when the disk cannot take the file."""
        path = self._staging.path / (file.name + PART)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._descriptors.add(descriptor)
        if file.size:
            os.posix_fallocate(descriptor, 0, file.size)  # a full disk shows now, not after hours
        return descriptor

    def _write_strip(self, opened: _Open, strip: Strip) -> None:
        tensor = self._strips[strip[0]]
        chunk = tensor.chunks[strip[1]]
        if not hasattr(self._buffers, "strip"):
            self._buffers.strip = torch.empty(STRIP_BYTES, dtype=torch.uint8)
        buffer = self._buffers.strip[: chunk.box.numel * tensor.dtype.itemsize].view(tensor.dtype)
        self._fill(opened, strip, buffer)
        self._count(opened, strip, buffer)
        self._write(opened, chunk.offset, bytes_of(buffer))

    def _fill(self, opened: _Open, strip: Strip, buffer: torch.Tensor) -> None:
        """Read a strip into a buffer of as many elements, of any dtype."""
        if strip[0] in self._job.tensors.zero:
            buffer.zero_()
        for copy in opened.copies.get(strip, ()):
            self._job.source.fetch(copy, copy.destination_window.of(buffer))

    def _count(self, opened: _Open, strip: Strip, values: torch.Tensor) -> None:
        """NaN, infinity, and what became infinite when it was cast."""
        (nan, inf), overflow = count_not_finite(values), 0
        if inf:
            uncast = torch.empty(values.numel(), dtype=torch.float64)
            self._fill(opened, strip, uncast)
            overflow = inf - int(uncast.isinf().sum())
        for what, count in (("nan", nan), ("inf", inf), ("overflow", overflow)):
            if count:
                with self._lock:
                    counts = opened.counts[what]
                    counts[strip[0]] = counts.get(strip[0], 0) + count

    def _write_blobs(self, opened: _Open) -> None:
        for offset, blob in opened.file.blobs:
            for at in range(0, blob.length, _BLOB_BYTES):
                buffer = memoryview(bytearray(min(_BLOB_BYTES, blob.length - at)))
                self._job.source.pool.read_into(blob.path, blob.offset + at, buffer)
                self._write(opened, offset + at, buffer)

    def _write(self, opened: _Open, offset: int, data: memoryview) -> None:
        done = 0
        while done < data.nbytes:
            done += os.pwrite(opened.descriptor, data[done : done + _CALL_BYTES], offset + done)
        crc = zlib_ng.crc32(data)
        with self._lock:
            opened.written.append((offset, data.nbytes, crc))
        self._advance(data.nbytes)

    def _finish(self, opened: _Open) -> None:
        file, weights = opened.file, sorted(opened.written)
        for offset, data in file.fixed:
            self._write(opened, offset, memoryview(data))
        for start, archive in file.archives:
            first = start + archive.head_bytes
            last = first + archive.data_bytes
            crc = _combined(span for span in weights if first <= span[0] < last)
            self._write(opened, start, memoryview(archive.head(crc)))
            self._write(opened, last, memoryview(archive.tail(crc)))
        with self._lock:
            self._descriptors.remove(opened.descriptor)
            os.close(opened.descriptor)
            result = FileResult(file=file.name, crc=_combined(sorted(opened.written)), counts=opened.counts)
            self._staging.finish(result, self._job.team.rank, fsync=self._job.options.fsync)
            self._results.append(result)


def _combined(spans: Iterable[tuple[int, int, int]]) -> int:
    """The CRC-32 of spans that lie one after the other."""
    crc = 0
    for _, length, own in spans:
        crc = zlib_ng.crc32_combine(crc, own, length)
    return crc
