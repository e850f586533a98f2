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
from titan_bridge.errors import BridgeError
from titan_bridge.json_file import json_object
from titan_bridge.sharding.boxes import Box
from titan_bridge.sharding.tensors import Chunk, TensorMetadata

_NAMES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: name for name, dtype in _NAMES.items()}
_MOST_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""
_ALIGNMENT = 64
METADATA = "__metadata__"


def read_header(path: Path) -> tuple[dict[str, TensorMetadata], dict[str, str]]:
    """Tensors by name, and the file's own metadata.
    Raises BridgeError: a file that is cut short or too long, a header that is not JSON of the right form, an unknown
    dtype, sizes that do not fit together, gaps, overlaps, or a name that appears twice."""
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
    start = 8 + length
    spans, entries = [], {}
    for name, data in header.items():
        dtype, shape, (first, last) = _entry(path, name, data)
        if last - first != math.prod(shape) * dtype.itemsize:
            raise BridgeError(
                f"{path}: {name} has {last - first} bytes; {data['dtype']} {list(shape)} needs "
                f"{math.prod(shape) * dtype.itemsize}"
            )
        spans.append((first, last, name))
        chunk = Chunk(owner=path, box=Box.whole(shape), offset=start + first)
        entries[name] = TensorMetadata(name=name, shape=shape, dtype=dtype, chunks=(chunk,))
    at = 0
    for first, last, name in sorted(spans):
        if first != at:
            raise BridgeError(f"{path}: {name} starts at byte {first} of the data; those before end at {at}")
        at = last
    if start + at != total:
        what = "truncated" if start + at > total else "something follows the last tensor"
        raise BridgeError(f"{path} has {total} bytes; its header describes {start + at}: {what}")
    return entries, metadata


def header_bytes(
    tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """The start of a file, and where in the file each tensor begins, in the order given.

    The data starts at a multiple of 64 bytes. Raises BridgeError for a dtype that the format does not have.
    """
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


def _entry(path: Path, name: str, data: Any) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(data, dict) or set(data) != {"dtype", "shape", "data_offsets"}:
        raise BridgeError(f"{path}: {name} must have exactly dtype, shape and data_offsets")
    dtype = _NAMES.get(data["dtype"]) if isinstance(data["dtype"], str) else None
    if dtype is None:
        raise BridgeError(f"{path}: {name} has dtype {data['dtype']!r}; allowed: {', '.join(_NAMES)}")
    shape, offsets = data["shape"], data["data_offsets"]
    for what, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or any(type(n) is not int or not 0 <= n < 2**62 for n in value):
            raise BridgeError(f"{path}: {name} has {what} {value!r}; it must be a list of whole numbers")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BridgeError(f"{path}: {name} has data_offsets {offsets}; they must be a start and an end")
    return dtype, tuple(shape), (offsets[0], offsets[1])
