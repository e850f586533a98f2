"""The safetensors format: headers read with suspicion and written aligned.

A file is 8 bytes of header length (little endian), the header (JSON), and the tensors' bytes without a gap. The library
reads it, too, but keeps to itself where in the file a tensor lies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from titan_bridge.checkpoint.files import read_bytes, size_of
from titan_bridge.errors import BridgeError, about
from titan_bridge.json_file import json_object
from titan_bridge.sharding.tensors import TensorMetadata

_NAMES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "C64": torch.complex64},
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
_CODES = {dtype: name for name, dtype in _NAMES.items()}
_MOST_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_ALIGNMENT = 64
METADATA = "__metadata__"


def read_header(path: Path) -> tuple[dict[str, TensorMetadata], dict[str, str]]:
    """Tensors by name, and the file's own metadata. Raises BridgeError: a file that is cut short or too long, a header
    that is not JSON of the right form, an unknown dtype, gaps, overlaps, or a name that appears twice."""
    total = size_of(path)
    if total < 8:
        raise BridgeError(f"{path} has {total} bytes; a safetensors file has at least 8")
    length = int.from_bytes(read_bytes(path, 0, 8), "little")
    if length > _MOST_HEADER or 8 + length > total:
        raise BridgeError(f"{path}: header of {length} bytes in {total}: truncated, or not safetensors")
    header = json_object(read_bytes(path, 8, length), f"{path}: the header")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BridgeError(f"{path}: {METADATA} must be an object of strings")
    start, at, entries = 8 + length, 0, {}
    with about(path):
        for (first, last), name, shape, dtype in sorted(_entry(name, data) for name, data in header.items()):
            if first != at:
                raise BridgeError(f"{name} starts at byte {first} of the data; those before it end at {at}")
            if last - first != (wanted := math.prod(shape) * dtype.itemsize):
                raise BridgeError(f"{name} has {last - first} bytes; {dtype} {list(shape)} needs {wanted}")
            entries[name] = TensorMetadata.whole(name, shape, dtype, path, offset=start + first)
            at = last
    if start + at != total:
        what = "truncated" if start + at > total else "something follows the last tensor"
        raise BridgeError(f"{path} has {total} bytes; its header describes {start + at}: {what}")
    return entries, metadata


def header_bytes(
    tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """The start of a file, and where in the file each tensor begins, in the order given.
    The data starts at a multiple of 64 bytes. Raises BridgeError for a dtype that the format does not have."""
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    at, offsets = 0, []
    for name, shape, dtype in tensors:
        if dtype not in _CODES:
            raise BridgeError(f"{name}: safetensors has no {dtype}; allowed: {', '.join(map(str, _CODES))}")
        last = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, last]}
        offsets.append(at)
        at = last
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + offset for offset in offsets]


def _entry(name: str, data: Any) -> tuple[list[int], str, tuple[int, ...], torch.dtype]:
    """(first and last byte in the data, name, shape, dtype)."""
    if not isinstance(data, dict) or set(data) != {"dtype", "shape", "data_offsets"}:
        raise BridgeError(f"{name} must have exactly dtype, shape and data_offsets")
    code, shape, offsets = data["dtype"], data["shape"], data["data_offsets"]
    if not isinstance(code, str) or code not in _NAMES:
        raise BridgeError(f"{name} has dtype {code!r}; allowed: {', '.join(_NAMES)}")
    for what, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or any(type(n) is not int or not 0 <= n < 2**62 for n in value):
            raise BridgeError(f"{name} has {what} {value!r}; it must be a list of whole numbers")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BridgeError(f"{name} has data_offsets {offsets}; they must be a start and an end")
    return offsets, name, tuple(shape), _NAMES[code]
