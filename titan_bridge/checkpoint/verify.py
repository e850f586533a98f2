"""Checksums: those of a source, those taken while a file was written, and a digest that tells checkpoints apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from zlib_ng import zlib_ng

from titan_bridge.checkpoint.archive import is_intact
from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.team import Team
from titan_bridge.errors import BridgeError, about

_BUFFER_BYTES = 16 << 20
_SAMPLES = 64  # places in each file that are looked at; training changes nearly every weight
_SAMPLE_BYTES = 512


def check_source(source: Checkpoint, team: Team, advance: Callable[[int], None] = lambda count: None) -> bool:
    """Compare this process' share of a source's archives with their CRC-32; False where any has none (safetensors, DCP
    written without). Raises BridgeError: the first archive that is damaged."""
    archives = {
        (chunk.path, chunk.offset, entry.nbytes if name in source.blobs else chunk.archive): name
        for name, entry in source.entries.items()
        for chunk in entry.chunks
    }
    checked = True
    for (path, offset, length), name in list(archives.items())[team.rank :: team.size]:
        if length is None:
            return False
        with about(f"{path}: {name}"):
            intact = is_intact(source.pool.part(path, offset, length), length)
            if intact is False:
                raise BridgeError(f"the bytes from {offset} on do not have their CRC-32: the file is damaged")
        checked = checked and intact is not None
        advance(length)
    return checked


def is_as_written(path: Path, crc: int, advance: Callable[[int], None] = lambda count: None) -> bool:
    """Read a file again from the disk and compare it with the CRC-32 of what was written.
    Raises BridgeError: it cannot be read."""
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


def digest(checkpoint: Checkpoint) -> str:
    """A digest of names, shapes, dtypes, file sizes and samples of every file.
    It is the same for copies in other folders or on other machines. It differs between two steps of a run, or two
    models of one size, unless they differ in a few places only. Raises BridgeError: a file that cannot be read."""
    hashed = hashlib.sha256(checkpoint.format.encode())
    files = set()
    for name, stored in sorted(checkpoint.tensors.items()):
        hashed.update(repr((name, stored.shape, stored.dtype)).encode())
        files.update(chunk.path for chunk in stored.chunks)
    for path in sorted(files):
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                hashed.update(repr((str(path.relative_to(checkpoint.path)), size)).encode())
                for sample in range(_SAMPLES):
                    offset = size * sample // _SAMPLES
                    hashed.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))
        except OSError as error:
            raise BridgeError(f"{path} cannot be read: {error.strerror}") from None
    return hashed.hexdigest()
