"""Execute a plan: strip by strip, each read once, cast, looked at for NaN, and written once.

A strip is a few megabytes of one destination tensor. It is put together in a buffer from wherever the source has
it, and cut from there into the files. So the memory is a few buffers for each worker, whatever the size of the
model, and both sides see large accesses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from zlib_ng import zlib_ng

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.files import SCRATCH_BYTES, bytes_of
from titan_bridge.checkpoint.finite import count_not_finite
from titan_bridge.checkpoint.output import PAGE, PIECE_BYTES, OutputFile, Pace, aligned
from titan_bridge.checkpoint.staging import PART, PartResult, Span, Staging, disk_error
from titan_bridge.checkpoint.strips import STRIP_BYTES, Strip
from titan_bridge.checkpoint.target import OutFile, Part, Place
from titan_bridge.sharding.boxes import Box, contiguous_stride
from titan_bridge.sharding.moves import Copy
from titan_bridge.sharding.plan import Plan

WORKER_BYTES = 2 * STRIP_BYTES + SCRATCH_BYTES + PIECE_BYTES
"""Memory of one worker: a strip, what is cut out of it, and the buffers of reads and writes."""
_BLOB_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one process does."""

    source: Checkpoint
    plan: Plan
    strips: Mapping[str, Sequence[Strip]]
    parts: Sequence[Part]
    """Those of this process that are not done yet."""
    empty: frozenset[str] = frozenset()
    """Tensors that have elements from nowhere: they become zero."""


@dataclass
class _Open:
    """A part that is being written."""

    part: Part
    copies: dict[tuple[str, int], list[Copy]]
    left: int
    files: dict[str, OutputFile] = field(default_factory=dict)
    spans: dict[str, list[Span]] = field(default_factory=dict)
    nan: dict[str, int] = field(default_factory=dict)
    inf: dict[str, int] = field(default_factory=dict)
    overflow: dict[str, int] = field(default_factory=dict)


class Executor:
    """Writes the parts of `work` into a staging directory."""

    def __init__(
        self,
        work: Work,
        staging: Staging,
        *,
        rank: int = 0,
        workers: int = 1,
        fsync: bool = False,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        """`advance` is told of bytes written, from any thread."""
        self._work = work
        self._staging = staging
        self._rank = rank
        self._workers = workers
        self._fsync = fsync
        self._advance = advance
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._buffers = threading.local()
        self._pace = Pace()
        self._stack = ExitStack()
        self._results: list[PartResult] = []

    def run(self) -> list[PartResult]:
        """Write everything; returns what is known of each part.

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
            self._stack.close()
        return self._results

    def _steps(self) -> Iterator[tuple[_Open, Strip | None]]:
        for part in self._work.parts:
            copies: dict[tuple[str, int], list[Copy]] = {}
            for copy in self._work.plan.copies(destination=part.name):
                assert copy.destination_chunk is not None
                copies.setdefault((copy.destination_name, copy.destination_chunk), []).append(copy)
            strips = self._work.strips[part.name]
            opened = _Open(part=part, copies=copies, left=len(strips) + 1)
            for file in part.files:
                self._create(opened, file)
            yield opened, None  # blobs, and parts without a strip
            for strip in strips:
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

    def _create(self, opened: _Open, file: OutFile) -> None:
        output = OutputFile(self._staging.path / (file.name + PART), file.size, self._pace)
        self._stack.callback(output.close)
        opened.files[file.name] = output
        opened.spans[file.name] = []

    def _write_strip(self, opened: _Open, strip: Strip) -> None:
        tensor = strip.unit.tensor
        places = _places(strip)
        first = places[0][1]
        shift = first % PAGE if first % tensor.dtype.itemsize == 0 else 0  # in memory as in the file
        buffer = self._buffer(strip.box.numel * tensor.dtype.itemsize, shift).view(tensor.dtype)
        self._fill(opened, strip, buffer)
        self._count(opened, strip, buffer)
        whole = buffer.view(strip.box.shape)
        for place, offset, common in places:
            # Strips span whole rows, so what they have in common with a place is one run of it.
            cut = whole[common.relative_to(strip.box.start).slices].contiguous()
            self._write(opened, place.file, offset, bytes_of(cut))

    def _fill(self, opened: _Open, strip: Strip, buffer: torch.Tensor) -> None:
        """Read a strip into a buffer of as many elements, of any dtype."""
        name = strip.unit.tensor.name
        if name in self._work.empty:
            buffer.zero_()
        for copy in opened.copies.get((name, strip.chunk), ()):
            self._work.source.fetch(copy, copy.destination_window.of(buffer))

    def _count(self, opened: _Open, strip: Strip, values: torch.Tensor) -> None:
        """NaN, infinity, and what became infinite when it was cast."""
        if not values.dtype.is_floating_point:
            return
        looked = values.to(torch.float32) if values.dtype.itemsize == 1 else values
        (nan, inf), overflow = count_not_finite(looked), 0
        if inf:
            uncast = torch.empty(values.numel(), dtype=torch.float64)
            self._fill(opened, strip, uncast)
            overflow = inf - int(uncast.isinf().sum())
        name = strip.unit.tensor.name
        for counts, count in ((opened.nan, nan), (opened.inf, inf), (opened.overflow, overflow)):
            if count:
                with self._lock:
                    counts[name] = counts.get(name, 0) + count

    def _write_blobs(self, opened: _Open) -> None:
        for file in opened.part.files:
            for offset, blob in file.blobs:
                for at in range(0, blob.length, _BLOB_BYTES):
                    buffer = bytearray(min(_BLOB_BYTES, blob.length - at))
                    self._work.source.pool.read_into(blob.path, blob.offset + at, memoryview(buffer))
                    self._write(opened, file.name, offset + at, memoryview(buffer))

    def _write(self, opened: _Open, file: str, offset: int, data: memoryview) -> None:
        if not data.nbytes:
            return
        opened.files[file].write(offset, data)
        span = Span(offset=offset, length=data.nbytes, crc=zlib_ng.crc32(data))
        with self._lock:
            opened.spans[file].append(span)
        self._advance(data.nbytes)

    def _finish(self, opened: _Open) -> None:
        for file in opened.part.files:
            output = opened.files[file.name]
            spans = sorted(opened.spans[file.name], key=lambda span: span.offset)
            frames = list(file.fixed)
            for start, archive in file.archives:
                first = start + archive.head_bytes
                crc = 0
                for span in spans:
                    if first <= span.offset < first + archive.data_bytes:
                        crc = zlib_ng.crc32_combine(crc, span.crc, span.length)
                frames += [(start, archive.head(crc)), (first + archive.data_bytes, archive.tail(crc))]
            for offset, data in frames:
                output.write(offset, memoryview(data))
                spans.append(Span(offset=offset, length=len(data), crc=zlib_ng.crc32(data)))
            opened.spans[file.name] = spans
            output.close()
        result = PartResult(
            part=opened.part.name,
            spans={file: tuple(spans) for file, spans in opened.spans.items()},
            nan=opened.nan,
            inf=opened.inf,
            overflow=opened.overflow,
        )
        with self._lock:
            self._staging.finish(result, self._rank, fsync=self._fsync)
            self._results.append(result)

    def _buffer(self, count: int, shift: int) -> torch.Tensor:
        """`count` bytes of this thread's strip buffer, `shift` bytes behind the start of a page."""
        if not hasattr(self._buffers, "strip"):
            self._buffers.strip = aligned(STRIP_BYTES + PAGE)
        if count > STRIP_BYTES:  # one row that cannot be cut
            return aligned(count + shift)[shift:]
        return self._buffers.strip[shift : shift + count]


def _places(strip: Strip) -> list[tuple[Place, int, Box]]:
    """Where a strip goes: the place, the byte of its file where the strip's part of it starts, and that part."""
    found = []
    for place in strip.unit.places:
        common = place.box.intersect(strip.box)
        if common is None:
            continue
        stride = contiguous_stride(place.box.shape)
        local = common.relative_to(place.box.start)
        first = sum(a * s for a, s in zip(local.start, stride, strict=True))
        found.append((place, place.offset + first * strip.unit.tensor.dtype.itemsize, common))
    return found
