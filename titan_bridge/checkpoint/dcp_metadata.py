"""DCP's `.metadata`: a pickle of dataclasses of torch.distributed.checkpoint, here as stand-ins on both ways.

Importing the classes takes a second of which a conversion needs nothing. DCP's reader sees no difference in what is
written (held by a test, object by object).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from titan_bridge.checkpoint.pickles import StandIn, load_file, size_from, stand_ins
from titan_bridge.sharding.tensors import Chunk, TensorMetadata

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
    "torch.Size": size_from,
}
_MOST_BYTES = 1 << 31


def read_metadata(path: Path) -> tuple[Any, int]:
    """The stand-in of the `Metadata` object, and the bytes of the file.
    Raises BridgeError: a pickle that is damaged, too large, or names anything that DCP does not need."""
    return load_file(path, _ALLOWED, _MOST_BYTES)


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
        file.flush()
        os.fsync(file.fileno())


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
