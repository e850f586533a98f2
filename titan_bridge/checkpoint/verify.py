"""Checksums: those that a source has of its own, and those that were taken while a part was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from zlib_ng import zlib_ng

from titan_bridge.checkpoint.archive import is_intact
from titan_bridge.checkpoint.checkpoint import Blob, Checkpoint
from titan_bridge.checkpoint.files import FilePool
from titan_bridge.checkpoint.staging import PartResult, Span
from titan_bridge.checkpoint.team import Team
from titan_bridge.errors import BridgeError
from titan_bridge.sharding.tensors import Chunk

_BUFFER_BYTES = 16 << 20


def check_source(source: Checkpoint, team: Team, advance: Callable[[int], None] = lambda count: None) -> bool:
    """Compare this process' share of a source's archives with their CRC-32.

    Returns:
        False where any has none: safetensors, or DCP that was written without.

    Raises:
        BridgeError: The first archive that is damaged.
    """
    stored = [*source.tensors.values(), *source.extra_tensors.values()]
    archives = {_archive(chunk): one.name for one in stored for chunk in one.chunks}
    archives |= {blob: name for name, blob in source.blobs.items()}
    checked, pool = True, FilePool()  # a pool of its own, since this does not count as bytes read
    for archive, name in list(archives.items())[team.rank :: team.size]:
        if archive is None:
            return False

        def read(offset: int, length: int, archive: Blob = archive) -> bytes:
            buffer = bytearray(length)
            pool.read_into(archive.path, archive.offset + offset, memoryview(buffer))
            return bytes(buffer)

        intact = is_intact(read, archive.length, f"{archive.path}: {name}")
        if intact is False:
            raise BridgeError(
                f"{archive.path}: {name}: the bytes from {archive.offset} on do not have their CRC-32; "
                "the file is damaged, restore it"
            )
        checked = checked and intact is not None
        advance(archive.length)
    pool.close()
    return checked


def _archive(chunk: Chunk) -> Blob | None:
    if chunk.archive is None:
        return None
    return Blob(path=chunk.path, offset=chunk.offset, length=chunk.archive)


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
