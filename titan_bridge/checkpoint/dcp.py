"""DCP directories (torch.distributed.checkpoint) as TorchTitan writes them.

`.metadata` is a pickle: tensors with their chunks, and for every chunk file, offset and length. Each chunk is an
archive of `torch.save` (see `archive.py`). A full training checkpoint has the model's tensors at the top level and
beside them `optimizer`, `lr_scheduler`, `dataloader` and `train_state`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titan_bridge.checkpoint.archive import locate
from titan_bridge.checkpoint.checkpoint import Blob, Checkpoint, Chunk, Stored, check_cover
from titan_bridge.checkpoint.files import FilePool, inside, read_bytes, size_of
from titan_bridge.checkpoint.hf import read_config
from titan_bridge.checkpoint.pickles import Record, kind_of, loads, records
from titan_bridge.errors import BridgeError
from titan_bridge.run_folder import METADATA
from titan_bridge.sharding.boxes import Box

TRAINING_STATE = ("optimizer", "lr_scheduler", "dataloader", "train_state")
"""Top-level entries of TorchTitan's full checkpoints that are not the model."""
_MODEL = "model"
_MOST_METADATA = 1 << 31

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
    "torch.Size": tuple,
}


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
            outside the directory; chunks that are not what the metadata says or do not cover their tensor.
    """
    source = directory / METADATA
    size = size_of(source)
    if size > _MOST_METADATA:
        raise BridgeError(f"{source} has {size} bytes; at most {_MOST_METADATA} are read")
    root = loads(read_bytes(source, 0, size), _ALLOWED, where=source)
    try:
        entries, places, paths = _read(root, directory)
    except BridgeError as error:
        raise BridgeError(f"{source}: {error}") from None
    tensors: dict[str, Stored] = {}
    others: dict[str, Stored] = {}
    blobs: dict[str, Blob] = {}
    other: dict[str, tuple[Any, ...]] = {}
    sizes = {path: size_of(path) for path in sorted({place.path for place in places.values()})}
    pool, left_out = FilePool(), 0
    for fqn, entry in entries.items():
        path = paths.get(fqn, (fqn,))
        name = None if entry is None else _model_name(path)
        if name is None and not extra:
            left_out += 1
        elif entry is None:
            place = _checked(places.get((fqn, None)), sizes, fqn)
            blobs[fqn], other[fqn] = Blob(path=place.path, offset=place.offset, length=place.length), path
        elif name is None:
            others[fqn], other[fqn] = _stored(fqn, fqn, *entry, places, sizes, pool), path
        elif name in tensors:
            raise BridgeError(f"{source}: {name} appears twice")
        else:
            tensors[name] = _stored(name, fqn, *entry, places, sizes, pool)
    pool.close()
    pool.bytes_read = 0  # headers do not count
    return Checkpoint(
        path=directory,
        format="dcp",
        tensors=tensors,
        extra_tensors=others,
        blobs=blobs,
        paths=other,
        left_out=left_out,
        config=read_config(directory),
        pool=pool,
    )


def _model_name(path: tuple[Any, ...]) -> str | None:
    """The TorchTitan FQN of an entry, None for what is no model tensor."""
    if len(path) == 1 and isinstance(path[0], str):
        return None if path[0].split(".")[0] in TRAINING_STATE else path[0]
    if path[0] == _MODEL and all(isinstance(part, str) for part in path):
        return ".".join(path[1:])
    return None


Entry = tuple[tuple[int, ...], torch.dtype, tuple[Box, ...]]


def _read(
    root: Any, directory: Path
) -> tuple[
    dict[str, Entry | None], dict[tuple[str, tuple[int, ...] | None], _Place], dict[str, tuple[Any, ...]]
]:
    """Entries (None: no tensor), places by (fqn, offset in the tensor), and paths, out of the records."""
    if kind_of(root) != "Metadata":
        raise BridgeError("no DCP metadata in this pickle")
    entries: dict[str, Entry | None] = {}
    for fqn, value in _dict(root, "state_dict_metadata").items():
        if not isinstance(fqn, str):
            raise BridgeError(f"the name of an entry is {fqn!r:.80}")
        if kind_of(value) == "BytesStorageMetadata":
            entries[fqn] = None
        elif kind_of(value) == "TensorStorageMetadata":
            entries[fqn] = _entry(fqn, value)
        else:
            raise BridgeError(f"{fqn} is neither a tensor nor bytes")
    places: dict[tuple[str, tuple[int, ...] | None], _Place] = {}
    for index, info in _dict(root, "storage_data").items():
        if kind_of(index) != "MetadataIndex" or kind_of(info) != "_StorageInfo":
            raise BridgeError("damaged storage_data")
        fqn, offset = index.field("fqn"), index.state.get("offset")
        if not isinstance(fqn, str) or not (offset is None or _is_shape(offset)):
            raise BridgeError(f"damaged place of {fqn!r:.80}")
        if info.state.get("transform_descriptors") if isinstance(info.state, dict) else True:
            raise BridgeError(
                f"{fqn} was transformed when it was written (compressed?); only plain files are read"
            )
        start, length = info.field("offset"), info.field("length")
        if not _is_shape((start, length)):
            raise BridgeError(f"{fqn} lies at {start!r:.40}, length {length!r:.40}")
        path = inside(directory, info.field("relative_path"), f"the place of {fqn}")
        if (fqn, offset) in places:
            raise BridgeError(f"{fqn} at {offset} has two places")
        places[fqn, offset] = _Place(path=path, offset=start, length=length)
    paths: dict[str, tuple[Any, ...]] = {}
    planner = root.state.get("planner_data")
    for fqn, path in (planner if isinstance(planner, dict) else {}).items():
        if isinstance(path, tuple) and path and all(isinstance(part, (str, int)) for part in path):
            paths[fqn] = path
    return entries, places, paths


def _entry(fqn: str, value: Record) -> Entry:
    shape, chunks = value.field("size"), value.field("chunks")
    properties = value.field("properties")
    state = properties.state if kind_of(properties) == "TensorProperties" else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not _is_shape(shape) or not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
        raise BridgeError(f"damaged description of {fqn}")
    boxes = []
    for chunk in chunks:
        if not isinstance(chunk, Record):
            raise BridgeError(f"damaged chunk of {fqn}")
        start, size = chunk.field("offsets"), chunk.field("sizes")
        if not _is_shape(start) or not _is_shape(size) or len(start) != len(size):
            raise BridgeError(f"damaged chunk of {fqn}")
        boxes.append(Box(start=start, stop=tuple(a + n for a, n in zip(start, size, strict=True))))
    check_cover(fqn, shape, boxes, METADATA)
    return shape, dtype, tuple(boxes)


def _stored(
    name: str,
    fqn: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    boxes: Sequence[Box],
    places: Mapping[tuple[str, tuple[int, ...] | None], _Place],
    sizes: Mapping[Path, int],
    pool: FilePool,
) -> Stored:
    chunks = []
    for box in boxes:
        place = _checked(places.get((fqn, box.start)), sizes, f"{fqn} at {box.start}")
        where = f"{place.path}: {fqn} at {box.start}"

        def read(offset: int, length: int, place: _Place = place, where: str = where) -> bytes:
            if offset < 0 or length < 0 or offset + length > place.length:
                raise BridgeError(f"{where}: damaged archive")
            buffer = bytearray(length)
            pool.read_into(place.path, place.offset + offset, memoryview(buffer))
            return bytes(buffer)

        found = locate(read, place.length, where)
        if found.shape != box.shape or found.dtype != dtype:
            raise BridgeError(
                f"{where}: the file has {found.dtype} {found.shape}, the metadata says {dtype} {box.shape}"
            )
        chunks.append(Chunk(path=place.path, offset=place.offset + found.offset, box=box))
    return Stored(name=name, shape=shape, dtype=dtype, chunks=tuple(chunks))


def _checked(place: _Place | None, sizes: Mapping[Path, int], what: str) -> _Place:
    if place is None:
        raise BridgeError(f"{METADATA} does not say where {what} lies")
    if place.offset + place.length > sizes[place.path]:
        raise BridgeError(
            f"{place.path} has {sizes[place.path]} bytes; {what} ends at {place.offset + place.length}: truncated?"
        )
    return place


def _dict(root: Record, name: str) -> dict[Any, Any]:
    value = root.field(name)
    if not isinstance(value, dict):
        raise BridgeError(f"{name} is no dict")
    return value


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and 0 <= n < 2**62 for n in value)
