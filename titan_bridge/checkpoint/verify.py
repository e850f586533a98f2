"""Read again what was written and compare it with the checksums taken while it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from zlib_ng import zlib_ng

from titan_bridge.checkpoint.staging import PartResult
from titan_bridge.errors import BridgeError

_BUFFER_BYTES = 16 << 20


def verify(
    directory: Path, results: Sequence[PartResult], advance: Callable[[int], None] = lambda count: None
) -> None:
    """Read files again from the disk and compare them with the checksums of what was written.

    Raises:
        BridgeError: The first file and byte where they differ.
    """
    buffer = bytearray(_BUFFER_BYTES)
    for result in results:
        for name, spans in result.spans.items():
            path = directory / name
            with path.open("rb", buffering=0) as file:
                os.fsync(file.fileno())  # pages that are not on the disk yet would be read from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                for span in spans:
                    crc, at = 0, 0
                    while at < span.length:
                        view = memoryview(buffer)[: min(len(buffer), span.length - at)]
                        count = os.preadv(file.fileno(), [view], span.offset + at)
                        if not count:
                            raise BridgeError(
                                f"{path} ends at byte {span.offset + at}; it was written longer"
                            )
                        crc, at = zlib_ng.crc32(view[:count], crc), at + count
                    if crc != span.crc:
                        raise BridgeError(
                            f"{path}: bytes {span.offset} to {span.offset + span.length} are not what was written; "
                            "the disk or the memory is at fault"
                        )
                    advance(span.length)
