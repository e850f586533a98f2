"""What tells one checkpoint from another without reading it all."""

from __future__ import annotations

import hashlib
import os

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.errors import BridgeError

_SAMPLES = 64
"""Places in each file that are looked at; training changes nearly every weight."""
_SAMPLE_BYTES = 512


def digest(checkpoint: Checkpoint) -> str:
    """A digest of names, shapes, dtypes, file sizes and samples of every file.

    It is the same for copies in other folders or on other machines. It differs between two steps of a run, or two
    models of one size, unless they differ in a few places only. Raises BridgeError: a file that cannot be read.
    """
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
