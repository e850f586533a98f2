"""Checksums: those that a source has of its own, and those that were taken while a file was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from zlib_ng import zlib_ng

from titan_bridge.checkpoint.archive import is_intact
from titan_bridge.checkpoint.checkpoint import Blob, Checkpoint
from titan_bridge.checkpoint.files import FilePool
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


def is_as_written(path: Path, crc: int, advance: Callable[[int], None] = lambda count: None) -> bool:
    """Read a file again from the disk and compare it with the CRC-32 of what was written.

    Raises:
        BridgeError: It cannot be read.
    """
    buffer, found = memoryview(bytearray(_BUFFER_BYTES)), 0
    try:
        with path.open("rb", buffering=0) as file:
            os.fsync(file.fileno())  # pages that are not on the disk yet would be read from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while count := file.readinto(buffer):
                found = zlib_ng.crc32(buffer[:count], found)
                advance(count)
    except OSError as error:
        raise BridgeError(f"{path} cannot be read: {error.strerror}") from None
    return found == crc
