"""Read again what was written and compare it with the checksums taken while it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from zlib_ng import zlib_ng

from titan_bridge.checkpoint.staging import PartResult, Span

_BUFFER_BYTES = 16 << 20


def damage(
    directory: Path, result: PartResult, advance: Callable[[int], None] = lambda count: None
) -> str | None:
    """Read the files of a part again from the disk and compare them with the checksums of what was written.

    Returns:
        The first file and bytes that differ, in words; None if all is well.
    """
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    for name, spans in result.spans.items():
        path = directory / name
        try:
            with path.open("rb", buffering=0) as file:
                os.fsync(file.fileno())  # pages that are not on the disk yet would be read from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                for span in spans:
                    if _crc(file.fileno(), span, buffer) != span.crc:
                        return f"{path}: bytes {span.offset} to {span.offset + span.length} are not what was written"
                    advance(span.length)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
    return None


def _crc(descriptor: int, span: Span, buffer: memoryview) -> int:
    """CRC-32 of a span as it is in the file, of less where that ends early."""
    crc, at = 0, 0
    while at < span.length:
        view = buffer[: span.length - at]
        count = os.preadv(descriptor, [view], span.offset + at)
        if not count:
            break
        crc, at = zlib_ng.crc32(view[:count], crc), at + count
    return crc
