"""Hugging Face checkpoints: config.json and one safetensors file, or several with an index.

A file is 8 bytes of header length (little endian), the header (JSON), and the tensors' bytes without a gap. Headers are
read with suspicion here: the library reads them, too, but keeps to itself where in the file a tensor lies.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.files import inside, read_bytes, size_of
from titan_bridge.errors import BridgeError, about
from titan_bridge.json_file import json_object, read_json_object
from titan_bridge.run_folder import INDEX, SINGLE
from titan_bridge.sharding.tensors import TensorMetadata

_NUMBERED = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_NAMES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "C64": torch.complex64},
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
_CODES = {dtype: name for name, dtype in _NAMES.items()}
_MOST_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_ALIGNMENT = 64
_METADATA = "__metadata__"
CARRIED = (  # patterns of small files that go with the weights wherever they go
    *("generation_config.json", "preprocessor_config.json", "chat_template*", "special_tokens_map.json"),
    *("tokenizer*.json", "tokenizer*.model", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
)


def is_hf(directory: Path) -> bool:
    """Whether the directory has safetensors weights under Hugging Face's names."""
    return (directory / SINGLE).is_file() or (directory / INDEX).is_file() or bool(_numbered(directory))


def open_hf(directory: Path) -> Checkpoint:
    """Open a directory with `model.safetensors`, or with the files that `model.safetensors.index.json` names.
    Without an index, all of `model-00001-of-0000N.safetensors` to the Nth.
    Raises BridgeError: what is missing, unreadable, contradictory or outside the directory."""
    index = directory / INDEX
    stored: dict[str, TensorMetadata] = {}
    if (directory / SINGLE).is_file():
        files = {directory / SINGLE: None}
    elif not index.is_file():
        files = dict.fromkeys(_all_numbered(directory))
    else:
        wanted: dict[Path, set[str]] = {}
        named = read_json_object(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise BridgeError(f"{index} has no weight_map; it must name the file of each tensor")
        for name, file in named.items():
            wanted.setdefault(inside(directory, file, str(index)), set()).add(name)
        files = dict(sorted(wanted.items()))
    for path, names in files.items():
        entries, _ = read_header(path)
        if names is not None and names != entries.keys():
            missing, extra = sorted(names - entries.keys()), sorted(entries.keys() - names)
            what = [f"{missing[0]} is not in it"] if missing else []
            what += [f"{extra[0]} is in it but not in the index"] if extra else []
            raise BridgeError(f"{path} and {INDEX} disagree: {'; '.join(what)}")
        for entry in entries.values():
            if entry.name in stored:
                first = stored[entry.name].chunks[0].path.name
                raise BridgeError(f"{entry.name} is in {first} and in {path.name}")
            stored[entry.name] = entry
    return Checkpoint(path=directory, format="hf", tensors=stored, config=read_config(directory))


def read_config(directory: Path) -> dict[str, Any] | None:
    """Parsed config.json, or None where there is none. Raises BridgeError for one that is not a JSON object."""
    path = directory / "config.json"
    return read_json_object(path) if path.is_file() else None


def carried_files(directory: Path) -> list[Path]:
    """The tokenizer and generation files of a directory."""
    found = {path for pattern in CARRIED for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name != INDEX)


def _numbered(directory: Path) -> dict[Path, tuple[int, int]]:
    """Files that say which one of how many they are."""
    matches = {path: _NUMBERED.fullmatch(path.name) for path in sorted(directory.glob("model-*.safetensors"))}
    return {path: (int(match[1]), int(match[2])) for path, match in matches.items() if match}


def _all_numbered(directory: Path) -> list[Path]:
    found = _numbered(directory)
    numbers, (count, *others) = map(set, zip(*found.values(), strict=True))
    if others:
        raise BridgeError(
            f"{directory} has files of {count} and {others[0]} parts and no {INDEX}: which are meant?"
        )
    if missing := set(range(1, count + 1)) - numbers:
        raise BridgeError(f"{directory} lacks part {min(missing)} of {count}, and {INDEX}; copy it too")
    return list(found)


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
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BridgeError(f"{path}: {_METADATA} must be an object of strings")
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
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
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
