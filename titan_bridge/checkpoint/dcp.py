"""DCP directories (torch.distributed.checkpoint) as TorchTitan writes them.

`.metadata` is a pickle: tensors with their chunks, and for every chunk file, offset and length. Each chunk is an
archive of `torch.save` (see `archive.py`). A full training checkpoint has the model's tensors at the top level and
beside them `optimizer`, `lr_scheduler`, `dataloader` and `train_state`. Opening reads `.metadata` only.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titan_bridge.checkpoint import pickles
from titan_bridge.checkpoint.checkpoint import Blob, Checkpoint, check_cover
from titan_bridge.checkpoint.files import inside, read_bytes, size_of
from titan_bridge.checkpoint.hf import read_config
from titan_bridge.checkpoint.pickles import Record, kind_of, loads, records
from titan_bridge.errors import BridgeError
from titan_bridge.run_folder import METADATA
from titan_bridge.sharding.boxes import Box
from titan_bridge.sharding.tensors import Chunk, TensorMetadata

TRAINING_STATE = ("optimizer", "lr_scheduler", "dataloader", "train_state")
"""Top-level entries of TorchTitan's full checkpoints that are not the model."""
_MODEL = "model"
_MOST_METADATA = 1 << 31
_MOST_DIMS = 64
_LONGEST_NAME = 4096

_META = "torch.distributed.checkpoint.metadata"
_ALLOWED: dict[str, Any] = {
    **records(
        *(
            f"{_META}.{name}"
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "TensorProperties",
                "ChunkStorageMetadata",
                "MetadataIndex",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.serialization._get_layout",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "pathlib.PureWindowsPath",
    ),
    "torch.Size": pickles.size,
}


_Places = dict[str, dict[tuple[int, ...] | None, "_Place"]]
"""By entry, then by offset in the tensor (None: no tensor)."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where one chunk or blob lies."""

    path: Path
    offset: int
    length: int


def is_dcp(directory: Path) -> bool:
    """Whether the directory has DCP's metadata."""
    return (directory / METADATA).is_file()


def open_dcp(directory: Path, *, extra: bool = False) -> Checkpoint:
    """Open a DCP directory. Tensors under a top-level `model` entry lose that prefix.

    Args:
        extra: Look up optimizer state and other entries that are no model tensors, too.

    Raises:
        BridgeError: Metadata that is damaged, hostile or of another version; files that are missing, too short or
            outside the directory; chunks that do not cover their tensor.
    """
    source = directory / METADATA
    size = size_of(source)
    if size > _MOST_METADATA:
        raise BridgeError(f"{source} has {size} bytes; at most {_MOST_METADATA} are read")
    root = loads(read_bytes(source, 0, size), _ALLOWED, where=source)
    try:
        return _open(root, directory, extra=extra, most_chunks=size)
    except BridgeError as error:
        raise BridgeError(f"{source}: {error}") from None


def _open(root: Any, directory: Path, *, extra: bool, most_chunks: int) -> Checkpoint:
    if kind_of(root) != "Metadata":
        raise BridgeError("no DCP metadata in this pickle")
    entries, paths = _dict(root, "state_dict_metadata"), _paths(root)
    places = _places(root, directory)
    tensors: dict[str, TensorMetadata] = {}
    others: dict[str, TensorMetadata] = {}
    blobs: dict[str, Blob] = {}
    other: dict[str, tuple[Any, ...]] = {}
    left_out, elsewhere = 0, []
    for fqn, entry in entries.items():
        if not _is_name(fqn):
            raise BridgeError(f"the name of an entry is {reprlib.repr(fqn)}")
        kind, path = kind_of(entry), paths.get(fqn, (fqn,))
        if kind not in ("BytesStorageMetadata", "TensorStorageMetadata"):
            raise BridgeError(f"{fqn} is neither a tensor nor bytes")
        name = _model_name(path) if kind == "TensorStorageMetadata" else None
        if name is None and not extra:
            left_out += 1
            if kind == "TensorStorageMetadata" and path[0] not in TRAINING_STATE:
                elsewhere.append(fqn)
            continue
        own = places.get(fqn, {})
        if kind == "BytesStorageMetadata":
            place = _known(own, None, fqn)
            blobs[fqn], other[fqn] = Blob(path=place.path, offset=place.offset, length=place.length), path
            continue
        if name in tensors:
            raise BridgeError(f"{name} appears twice")
        stored = _stored(name or fqn, fqn, entry, own, most_chunks)
        most_chunks -= len(stored.chunks)
        if name is None:
            others[fqn], other[fqn] = stored, path
        else:
            tensors[name] = stored
    return Checkpoint(
        path=directory,
        format="dcp",
        tensors=tensors,
        extra_tensors=others,
        blobs=blobs,
        paths=other,
        left_out=left_out,
        elsewhere=tuple(name for name in elsewhere if name.split(".")[0] not in TRAINING_STATE),
        config=read_config(directory),
    )


def _model_name(path: tuple[Any, ...]) -> str | None:
    """The TorchTitan FQN of an entry, None for what is no model tensor."""
    if len(path) == 1 and isinstance(path[0], str):
        return None if path[0].split(".")[0] in TRAINING_STATE else path[0]
    if path[0] == _MODEL and all(isinstance(part, str) for part in path):
        return ".".join(path[1:])
    return None


def _paths(root: Record) -> dict[str, tuple[Any, ...]]:
    """Where entries stand in the nested state dict."""
    planner = root.state.get("planner_data")
    paths: dict[str, tuple[Any, ...]] = {}
    for fqn, path in (planner if isinstance(planner, dict) else {}).items():
        parts = path if isinstance(path, tuple) and len(path) <= _MOST_DIMS else ()
        if parts and all(_is_name(part) or type(part) is int for part in parts):
            paths[fqn] = parts
    return paths


def _places(root: Record, directory: Path) -> _Places:
    places: _Places = {}
    files: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    for index, info in _dict(root, "storage_data").items():
        if kind_of(index) != "MetadataIndex" or kind_of(info) != "_StorageInfo":
            raise BridgeError("damaged storage_data")
        fqn, offset = index.field("fqn"), index.state.get("offset")
        if not _is_name(fqn) or not (offset is None or _is_shape(offset)):
            raise BridgeError(f"damaged place of {reprlib.repr(fqn)}")
        if info.state.get("transform_descriptors") if isinstance(info.state, dict) else True:
            raise BridgeError(
                f"{fqn} was transformed when it was written (compressed?); only plain files are read"
            )
        start, length, file = info.field("offset"), info.field("length"), info.field("relative_path")
        if not _is_shape((start, length)) or not _is_name(file):
            raise BridgeError(
                f"{fqn} lies in {reprlib.repr(file)} at {reprlib.repr(start)}, length {reprlib.repr(length)}"
            )
        if file not in files:
            files[file] = inside(directory, file, f"the place of {fqn}")
            sizes[file] = size_of(files[file])
        if start + length > sizes[file]:
            raise BridgeError(
                f"{files[file]} has {sizes[file]} bytes; {fqn} ends at {start + length}: truncated?"
            )
        own = places.setdefault(fqn, {})
        if offset in own:
            raise BridgeError(f"{fqn} at {offset} has two places")
        own[offset] = _Place(path=files[file], offset=start, length=length)
    return places


def _stored(
    name: str, fqn: str, entry: Record, places: Mapping[tuple[int, ...] | None, _Place], most_chunks: int
) -> TensorMetadata:
    shape, listed, properties = entry.field("size"), entry.field("chunks"), entry.field("properties")
    state = properties.state if kind_of(properties) == "TensorProperties" else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not _is_shape(shape) or not isinstance(dtype, torch.dtype) or not isinstance(listed, list):
        raise BridgeError(f"damaged description of {fqn}")
    if len(listed) > most_chunks:  # one list may stand for many tensors
        raise BridgeError(f"more chunks than {METADATA} has room for")
    chunks = []
    for chunk in listed:
        if not isinstance(chunk, Record):
            raise BridgeError(f"damaged chunk of {fqn}")
        start, size = chunk.field("offsets"), chunk.field("sizes")
        if not _is_shape(start) or not _is_shape(size) or len(start) != len(size):
            raise BridgeError(f"damaged chunk of {fqn}")
        box = Box(start=start, stop=tuple(a + n for a, n in zip(start, size, strict=True)))
        place = _known(places, start, f"{fqn} at {start}")
        chunks.append(Chunk(owner=place.path, offset=place.offset, box=box, archive=place.length))
    check_cover(fqn, shape, [chunk.box for chunk in chunks], METADATA)
    return TensorMetadata(name=name, shape=shape, dtype=dtype, chunks=tuple(chunks))


def _known(
    places: Mapping[tuple[int, ...] | None, _Place], offset: tuple[int, ...] | None, what: str
) -> _Place:
    if offset not in places:
        raise BridgeError(f"nothing says where {what} lies")
    return places[offset]


def _dict(root: Record, name: str) -> dict[Any, Any]:
    value = root.field(name)
    if not isinstance(value, dict):
        raise BridgeError(f"{name} is no dict")
    return value


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= _MOST_DIMS
        and all(type(n) is int and 0 <= n < 2**62 for n in value)
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_NAME
