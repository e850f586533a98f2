"""DCP directories (torch.distributed.checkpoint) as TorchTitan writes them.

`.metadata` is a pickle: tensors with their chunks, and for every chunk file, offset and length. Its classes are
stand-ins on both ways, since importing torch's takes a second of which a conversion needs nothing; DCP's reader sees no
difference in what is written (held by a test, object by object). Each chunk is an archive of `torch.save` (see
`archive.py`). A full training checkpoint has the model's tensors at the top level and beside them `optimizer`,
`lr_scheduler`, `dataloader` and `train_state`. Opening reads `.metadata` only.
"""

from __future__ import annotations

import gc
import pickle
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from titan_bridge.checkpoint import pickles
from titan_bridge.checkpoint.checkpoint import Checkpoint, check_cover
from titan_bridge.checkpoint.files import inside, size_of
from titan_bridge.checkpoint.hf import read_config
from titan_bridge.checkpoint.pickles import StandIn, fields, is_shape, kind_of, stand_ins
from titan_bridge.errors import BridgeError, about
from titan_bridge.run_folder import METADATA
from titan_bridge.sharding.boxes import Box
from titan_bridge.sharding.tensors import Chunk, TensorMetadata

TRAINING_STATE = ("optimizer", "lr_scheduler", "dataloader", "train_state")
"""Top-level entries of TorchTitan's full checkpoints that are not the model."""
_MODEL = "model"
_LONGEST_NAME = 4096

_META = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_CLASSES = {
    **stand_ins(_META, "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
    **stand_ins(_META, "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    **stand_ins(_FILESYSTEM, "_StorageInfo"),
}
_ALLOWED = {
    **_CLASSES,
    **stand_ins("torch.serialization", "_get_layout"),
    **stand_ins("pathlib", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "torch.Size": pickles.size_from,
}
_MOST_METADATA = 1 << 31
_Place = tuple[Path, int, int]  # file, first byte, bytes
_Own = dict[tuple[int, ...] | None, _Place]
"""The places of one entry by offset in the tensor (None: no tensor)."""


def is_dcp(directory: Path) -> bool:
    """Whether the directory has DCP's metadata."""
    return (directory / METADATA).is_file()


def open_dcp(directory: Path, *, extra: bool = False) -> Checkpoint:
    """Open a DCP directory. Tensors under a top-level `model` entry lose that prefix.

    `extra`: look up optimizer state and other entries that are no model tensors, too.
    Raises BridgeError: metadata that is damaged, hostile or of another version; files that are missing, too short or
    outside the directory; chunks that do not cover their tensor.
    """
    source, collects = directory / METADATA, gc.isenabled()
    gc.disable()  # none of a million objects is garbage, and looking through them takes a third of the time
    try:
        root, size = pickles.load_file(source, _ALLOWED, _MOST_METADATA)
        with about(source):
            return _open(root, directory, extra=extra, most_chunks=size)
    finally:
        if collects:
            gc.enable()


def _open(root: Any, directory: Path, *, extra: bool, most_chunks: int) -> Checkpoint:
    entries, storage = fields(root, "Metadata", "state_dict_metadata", "storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise BridgeError("damaged metadata")
    paths, places = _paths(vars(root).get("planner_data")), _places(storage, directory)
    tensors: dict[str, TensorMetadata] = {}
    others, blobs, stands, elsewhere, left_out = {}, {}, {}, [], 0
    for fqn, entry in entries.items():
        if not _is_name(fqn):
            raise BridgeError(f"the name of an entry is {reprlib.repr(fqn)}")
        kind, path, own = kind_of(entry), paths.get(fqn, (fqn,)), places.get(fqn, {})
        if not (is_tensor := kind == "TensorStorageMetadata") and kind != "BytesStorageMetadata":
            raise BridgeError(f"{fqn} is neither a tensor nor bytes")
        name = _model_name(path) if is_tensor else None
        if name is None and not extra:
            left_out += 1
            if is_tensor and path[0] not in TRAINING_STATE and fqn.split(".")[0] not in TRAINING_STATE:
                elsewhere.append(fqn)
        elif is_tensor:
            into = others if name is None else tensors
            if (name or fqn) in into:
                raise BridgeError(f"{name} appears twice")
            into[name or fqn] = stored = _stored(name or fqn, fqn, entry, own, most_chunks)
            most_chunks -= len(stored.chunks)
        else:
            file, start, length = _known(own, None, fqn)
            blobs[fqn] = TensorMetadata.whole(fqn, (length,), torch.uint8, file, offset=start)
        if name is None and extra:
            stands[fqn] = path
    return Checkpoint(
        path=directory,
        format="dcp",
        tensors=tensors,
        extra_tensors=others,
        blobs=blobs,
        paths=stands,
        left_out=left_out,
        elsewhere=tuple(elsewhere),
        config=read_config(directory),
    )


def _model_name(path: tuple[Any, ...]) -> str | None:
    """The TorchTitan FQN of an entry, None for what is no model tensor."""
    if len(path) == 1 and isinstance(path[0], str):
        return None if path[0].split(".")[0] in TRAINING_STATE else path[0]
    if path[0] == _MODEL and all(isinstance(part, str) for part in path):
        return ".".join(path[1:])
    return None


def _paths(planner: Any) -> dict[str, tuple[Any, ...]]:
    """Where entries stand in the nested state dict."""
    paths: dict[str, tuple[Any, ...]] = {}
    for fqn, path in (planner if isinstance(planner, dict) else {}).items():
        parts = path if isinstance(path, tuple) and len(path) <= pickles.MOST_DIMS else ()
        if parts and all(_is_name(part) or type(part) is int for part in parts):
            paths[fqn] = parts
    return paths


def _places(storage: dict[Any, Any], directory: Path) -> dict[str, _Own]:
    places: dict[str, _Own] = {}
    files: dict[str, tuple[Path, int]] = {}
    for index, info in storage.items():
        (fqn,) = fields(index, "MetadataIndex", "fqn")
        start, length, file = fields(info, "_StorageInfo", "offset", "length", "relative_path")
        offset = vars(index).get("offset")
        if not _is_name(fqn) or not (offset is None or is_shape(offset)):
            raise BridgeError(f"damaged place of {reprlib.repr(fqn)}")
        if vars(info).get("transform_descriptors"):
            raise BridgeError(f"{fqn} was transformed when written (compressed?); only plain files are read")
        if not is_shape((start, length)) or not _is_name(file):
            raise BridgeError(f"{fqn} lies in (file, offset, length) {reprlib.repr((file, start, length))}")
        if file not in files:
            path = inside(directory, file, f"the place of {fqn}")
            files[file] = path, size_of(path)
        path, size = files[file]
        if start + length > size:
            raise BridgeError(f"{path} has {size} bytes; {fqn} ends at {start + length}: truncated?")
        own = places.setdefault(fqn, {})
        if offset in own:
            raise BridgeError(f"{fqn} at {offset} has two places")
        own[offset] = path, start, length
    return places


def _stored(name: str, fqn: str, entry: Any, places: _Own, most_chunks: int) -> TensorMetadata:
    shape, listed, properties = fields(entry, "TensorStorageMetadata", "size", "chunks", "properties")
    (state,) = fields(properties, "TensorProperties", "state")
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not is_shape(shape) or not isinstance(dtype, torch.dtype) or not isinstance(listed, list):
        raise BridgeError(f"damaged description of {fqn}")
    if len(listed) > most_chunks:  # one list may stand for many tensors
        raise BridgeError(f"more chunks than {METADATA} has room for")
    chunks = []
    for chunk in listed:
        start, size = fields(chunk, "ChunkStorageMetadata", "offsets", "sizes")
        if not is_shape(start) or not is_shape(size) or len(start) != len(size):
            raise BridgeError(f"damaged chunk of {fqn}")
        box = Box(start=start, stop=tuple(a + n for a, n in zip(start, size, strict=True)))
        file, first, length = _known(places, start, f"{fqn} at {start}")
        chunks.append(Chunk(owner=file, offset=first, box=box, archive=length))
    check_cover(fqn, shape, [chunk.box for chunk in chunks])
    return TensorMetadata(name=name, shape=shape, dtype=dtype, chunks=tuple(chunks))


def _known(places: _Own, offset: tuple[int, ...] | None, what: str) -> _Place:
    if offset not in places:
        raise BridgeError(f"nothing says where {what} lies")
    return places[offset]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_NAME


def write_metadata(path: Path, tensors: Mapping[str, TensorMetadata], paths: Mapping[str, tuple]) -> None:
    """Write the `.metadata` file at `path`, in the classes that DCP's own reader unpickles.

    `tensors`: by FQN, with chunks in archives (one without is an entry of bytes) of files relative to `path`; several
    names may have the same chunks. `paths`: where entries stand in the nested state dict, if not at the top.
    """
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    contiguous = _make("_MEM_FORMAT_ENCODING", (0,))
    for fqn, tensor in tensors.items():
        if all(chunk.archive is None for chunk in tensor.chunks):
            (blob,) = tensor.chunks
            entries[fqn] = _make("BytesStorageMetadata")
            places[_make("MetadataIndex", fqn=fqn, index=None)] = _place(blob, tensor.nbytes)
            continue
        chunks = []
        for index, chunk in enumerate(tensor.chunks):
            start, size = torch.Size(chunk.box.start), torch.Size(chunk.box.shape)
            chunks.append(_make("ChunkStorageMetadata", offsets=start, sizes=size))
            at = _make("MetadataIndex", fqn=fqn, index=index, offset=start)
            places[at] = _place(chunk, chunk.archive)
        # dtype, layout, requires_grad, memory format, pin_memory
        properties = _make("TensorProperties", state=(tensor.dtype, torch.strided, False, contiguous, False))
        shape = torch.Size(tensor.shape)
        entries[fqn] = _make("TensorStorageMetadata", properties=properties, size=shape, chunks=chunks)
    metadata = _make(
        "Metadata",
        state_dict_metadata=entries,
        planner_data={fqn: paths.get(fqn, (fqn,)) for fqn in entries},
        storage_data=places,
        storage_meta=_make("StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[]),
        version="1.0.0",
    )
    with path.open("wb") as file:
        _Pickler(file).dump(metadata)


def _make(kind: str, args: tuple[Any, ...] = (), **fields: Any) -> StandIn:
    return _CLASSES[f"{_FILESYSTEM if kind == '_StorageInfo' else _META}.{kind}"](args, **fields)


def _place(chunk: Chunk, length: int | None) -> StandIn:
    return _make("_StorageInfo", relative_path=str(chunk.path), offset=chunk.offset, length=length)


_InPython: Any = pickle._Pickler  # type: ignore[attr-defined]  # the one in C looks every class up


class _Pickler(_InPython):
    """Takes the stand-ins at their word; everything else is looked up, as always."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if not (isinstance(obj, type) and issubclass(obj, StandIn)):
            super().save_global(obj, name)
            return
        self.save(obj.__module__)
        self.save(obj.__name__)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)
