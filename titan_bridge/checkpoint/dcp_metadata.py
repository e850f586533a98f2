"""Write DCP's `.metadata`: a pickle of dataclasses of torch.distributed.checkpoint.

Importing those takes a second of which a conversion needs nothing, so the pickle names them and stand-ins lend their
fields. DCP's reader sees no difference (held by a test, object by object).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titan_bridge.sharding.boxes import Box

_META = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True, kw_only=True)
class Written:
    """One chunk, or one entry that is no tensor (`box` is None), as it was written."""

    fqn: str
    file: str
    """Relative to the directory."""
    offset: int
    length: int
    box: Box | None


def write_metadata(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    written: Sequence[Written],
    paths: Mapping[str, tuple[Any, ...]],
) -> None:
    """Write the `.metadata` file at `path`, in the classes that DCP's own reader unpickles.

    Args:
        tensors: Global shape and dtype of each tensor.
        written: Every chunk of them, in any order, and the other entries. Two names may share one place.
        paths: Where entries stand in the nested state dict, if not at the top.
    """
    chunks: dict[str, list[Any]] = {fqn: [] for fqn in tensors}
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for item in written:
        info = _StorageInfo(relative_path=item.file, offset=item.offset, length=item.length)
        if item.box is None:
            entries[item.fqn] = BytesStorageMetadata()
            places[MetadataIndex(fqn=item.fqn, index=None)] = info
            continue
        start, size = torch.Size(item.box.start), torch.Size(item.box.shape)
        places[MetadataIndex(fqn=item.fqn, index=len(chunks[item.fqn]), offset=start)] = info
        chunks[item.fqn].append(ChunkStorageMetadata(offsets=start, sizes=size))
    for fqn, (shape, dtype) in tensors.items():
        entries[fqn] = TensorStorageMetadata(
            properties=TensorProperties(dtype), size=torch.Size(shape), chunks=chunks[fqn]
        )
    metadata = Metadata(
        state_dict_metadata=entries,
        planner_data={fqn: paths.get(fqn, (fqn,)) for fqn in entries},
        storage_data=places,
        storage_meta=StorageMeta(checkpoint_id=None, save_id=None, load_id=None, modules=[]),
        version="1.0.0",
    )
    with path.open("wb") as file:
        _Pickler(file).dump(metadata)
        file.flush()
        os.fsync(file.fileno())


class _StandIn:
    """Pickled as an object of the class `module`.<its own name>, with these fields."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __init_subclass__(cls, module: str = _META) -> None:
        cls.__module__ = module


class Metadata(_StandIn):
    pass


class StorageMeta(_StandIn):
    pass


class MetadataIndex(_StandIn):
    pass


class BytesStorageMetadata(_StandIn):
    pass


class TensorStorageMetadata(_StandIn):
    pass


class ChunkStorageMetadata(_StandIn):
    pass


class _StorageInfo(_StandIn, module="torch.distributed.checkpoint.filesystem"):
    pass


class _MEM_FORMAT_ENCODING(_StandIn):
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (0,)  # TORCH_CONTIGUOUS_FORMAT


class TensorProperties(_StandIn):
    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __getstate__(self) -> tuple[Any, ...]:
        layout, requires_grad, pin_memory = torch.strided, False, False
        return self._dtype, layout, requires_grad, _CONTIGUOUS, pin_memory


_CONTIGUOUS = _MEM_FORMAT_ENCODING()


_InPython: Any = pickle._Pickler  # type: ignore[attr-defined]  # the one in C looks every class up


class _Pickler(_InPython):
    """Takes the stand-ins at their word; everything else is looked up, as always."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if not (isinstance(obj, type) and issubclass(obj, _StandIn)):
            super().save_global(obj, name)
            return
        self.save(obj.__module__)
        self.save(obj.__name__)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)
