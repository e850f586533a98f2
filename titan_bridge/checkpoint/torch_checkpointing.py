"""Folders of the package torch_checkpointing (0.1, TorchTitan's second manager): `model_0.pt`, `model_1.pt`, ...

Each rank saves each item (the model, the optimizer) with torch.save in a file of its own: plain tensors, and DTensors
with their local tensor. `metadata.pkl` has the global shapes, meshes and placements; it is there if the item was saved
with a resharder. Both are pickles, of which nothing is run. Without metadata only the files of a single rank say where
their tensors belong.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from titan_bridge.checkpoint.archive import Placed, Saved, Tensor
from titan_bridge.checkpoint.checkpoint import Checkpoint, check_cover
from titan_bridge.checkpoint.files import FilePool, inside, size_of
from titan_bridge.checkpoint.hf import read_config, read_header
from titan_bridge.checkpoint.pickles import MOST_DIMS, is_shape, load_file, size_from, stand_ins
from titan_bridge.errors import BridgeError, about, few
from titan_bridge.sharding import dtensor
from titan_bridge.sharding.boxes import Box, Piece, fsdp_is_exact, local_shape_of, pieces_of
from titan_bridge.sharding.layout import MeshLayout, torch_dtype
from titan_bridge.sharding.spec import placement_from_str
from titan_bridge.sharding.tensors import Chunk, TensorMetadata

METADATA = "metadata.pkl"
_MODEL = "model"
_VERSION = "2.0"
_MOST_BYTES = 1 << 28  # of a pickle
_DTENSOR = "torch.distributed.tensor"
_MESH = "torch.distributed._mesh_layout"

_PLACEMENTS = {"Replicate": "R", "Shard": "S({dim})", "StridedShard": "SS({dim},{factor})"}

Keys = tuple[str | int, ...]  # where a tensor stands in the nested state dict of an item
Find = Callable[[Keys], Placed]
Files = Callable[[int], tuple[Path, Find]]  # rank to the file of an item, and what finds tensors in it
Tensors = dict[str, TensorMetadata]
Shape = tuple[int, ...]
Placements: TypeAlias = "tuple[dtensor.Placement, ...]"
T = TypeVar("T")


def is_torch_checkpointing(directory: Path) -> bool:
    """Whether the directory has the package's metadata, or a model as its first rank saves it."""
    return (directory / METADATA).is_file() or (directory / f"{_MODEL}_0.pt").is_file()


def open_torch_checkpointing(directory: Path, *, extra: bool = False) -> Checkpoint:
    """Open a folder: the tensors of the item `model` under their own names.

    `extra`: look up the tensors of other items, too; they are called ITEM.NAME.
    Raises BridgeError: metadata that is damaged, hostile or of another version; several ranks without metadata; tensors
    that are missing, are not what the metadata says, or do not make up the whole.
    """
    pool = FilePool()
    if (directory / METADATA).is_file():
        items, left_out = _described(pool, directory, extra=extra)
    else:
        items, left_out = {_MODEL: _of_one_rank(pool, directory)}, 0
    model = items.pop(_MODEL, None)
    if not model:
        raise BridgeError(f"{directory} has no item {_MODEL!r} with tensors (in {_MODEL}_RANK.pt)")
    return Checkpoint(
        path=directory,
        format="dcp",  # its names and its conventions
        tensors=model,
        extra_tensors={tensor.name: tensor for item in items.values() for tensor in item.values()},
        left_out=left_out,
        config=read_config(directory),
        pool=pool,
    )


def _described(pool: FilePool, directory: Path, *, extra: bool) -> tuple[dict[str, Tensors], int]:
    """The tensors by item and name, and how many entries of other items were not looked up."""
    root, _ = load_file(directory / METADATA, {}, _MOST_BYTES)
    items: dict[str, Tensors] = {}
    left_out = 0
    with about(directory / METADATA):
        if (version := _get(root, "version", str)) != _VERSION:
            raise BridgeError(f"version {version!r:.20}; read is {_VERSION!r}")
        for item, described in _get(root, "metadata", dict).items():
            paths = _get(described, "nested_path_to_metadata", dict)
            if item != _MODEL and not extra:
                left_out += len(paths)
                continue
            files = _files(pool, directory, item, _get(described, "rank_to_layout_info", dict))
            found = items.setdefault(item, {})
            for text, groups in paths.items():
                if (name := _dotted(path := _path(text))) in found:
                    raise BridgeError(f"{name} appears twice in {item}")
                found[name] = _tensor(name if item == _MODEL else f"{item}.{name}", path, groups, files)
    return items, left_out


def _files(pool: FilePool, directory: Path, item: str, layouts: dict[int, Any]) -> Files:
    """The files of an item, which are opened when they are asked for."""
    ranks: dict[Path, int] = {}

    @cache
    def of_rank(rank: int) -> tuple[Path, Find]:
        if rank not in layouts:
            raise BridgeError(f"nothing says where rank {rank} saved {item}")
        layout = layouts[rank] or {"file_path": f"{item}_{rank}.pt", "serialization_format": {}}
        path = inside(directory, _get(layout, "file_path", str), f"{METADATA}: {item} of rank {rank}")
        if ranks.setdefault(path, rank) != rank:
            raise BridgeError(f"{path} is the file of ranks {ranks[path]} and {rank}")
        form = _get(layout, "serialization_format", dict).get("type", "TorchSerialization")
        if form == "SafetensorsSerialization":
            return path, _in_safetensors(path)
        if form != "TorchSerialization":
            raise BridgeError(f"{path} is of {form!r:.40}; allowed: Torch- and SafetensorsSerialization")
        return path, _in_pickle(pool, path)[1]

    return of_rank


def _tensor(name: str, path: Keys, groups: Any, files: Files) -> TensorMetadata:
    """A tensor from what one or several groups of ranks (each on a mesh) have of it."""
    if not isinstance(groups, list) or not groups:
        raise BridgeError(f"{name} has no ranks")
    chunks: dict[Box, Chunk] = {}
    kinds = set()
    for group in groups:
        packed = _get(group, "sharding_metadata", dict)
        if (kind := _get(packed, "type", str)) != "DTensorShardingMetadata":
            raise BridgeError(f"{name} is described as {kind!r:.40}; only DTensors and plain ones are read")
        data = _get(packed, "data", dict)
        shape = _shape(data, "global_shape")
        dtype = torch_dtype(_get(data, "dtype", str).removeprefix("torch."))
        kinds.add((shape, dtype))
        mesh, placements = _mesh(data, name, shape)
        for position, local, pieces in _held(placements, shape, mesh.shape):
            if all(piece.box in chunks for piece in pieces):
                continue  # a replica
            file, find = files(mesh.ranks[position])
            placed = find(path)
            if (placed.shape, placed.dtype) != (local, dtype):
                held = f"{file}: {name} is {placed.dtype} {placed.shape}"
                raise BridgeError(f"{held}; the metadata says {dtype} {local}")
            for piece in pieces:
                first = piece.local.start[0] * math.prod(local[1:]) if local else 0
                offset = placed.offset + first * dtype.itemsize
                chunks[piece.box] = Chunk(owner=file, offset=offset, box=piece.box)
    if len(kinds) > 1:
        raise BridgeError(f"{name} has several shapes or dtypes: {few([f'{d} {s}' for s, d in kinds])}")
    ((shape, dtype),) = kinds
    check_cover(name, shape, list(chunks))
    return TensorMetadata(name=name, shape=shape, dtype=dtype, chunks=tuple(chunks.values()))


@lru_cache(maxsize=1024)
def _held(placements: Placements, shape: Shape, mesh: Shape) -> list[tuple[int, Shape, tuple[Piece, ...]]]:
    """Position on the mesh, shape of the local tensor and pieces, for the first of each set of replicas."""
    first = [isinstance(placement, dtensor.Replicate) for placement in placements]
    found = []
    for coordinate in itertools.product(*(range(1 if r else n) for r, n in zip(first, mesh, strict=True))):
        if pieces := pieces_of(placements, shape, mesh, coordinate):
            position = int(np.ravel_multi_index(coordinate, mesh))
            found.append((position, local_shape_of(placements, shape, mesh, coordinate), pieces))
    return found


def _mesh(data: dict[str, Any], name: str, shape: Shape) -> tuple[MeshLayout, Placements]:
    stated = _get(data, "mesh_spec", dict)
    sizes, ranks = _shape(stated, "mesh_shape"), _get(stated, "mesh_data", list, tuple)
    mesh = MeshLayout(axes=tuple(map(str, range(len(sizes)))), shape=sizes, ranks=tuple(ranks))
    listed = _get(data, "placements", list)
    if len(listed) != len(sizes):
        raise BridgeError(f"{name} has {len(listed)} placements on a mesh of {len(sizes)} axes")
    placements = []
    for chunks, placement in zip(sizes, listed, strict=True):
        if (kind := _get(placement, "type", str)) not in _PLACEMENTS:
            raise BridgeError(f"{name} has the placement {kind!r:.40}; allowed: {', '.join(_PLACEMENTS)}")
        stated = {"dim": placement.get("dim"), "factor": placement.get("split_factor")}
        placements.append(made := placement_from_str(_PLACEMENTS[kind].format_map(stated)))
        if isinstance(made, dtensor._StridedShard):
            dim, factor = made.dim, int(made.split_factor)
            exact = dim == 0 and len(shape) > 0 and factor <= len(ranks)
            if not exact or not fsdp_is_exact(shape[0], factor, chunks):
                raise BridgeError(
                    f"{name} of shape {shape} is StridedShard({dim}, split_factor={factor}); read is one of dim 0 "
                    "that cuts it evenly"
                )
    return mesh, tuple(placements)


def _of_one_rank(pool: FilePool, directory: Path) -> Tensors:
    """The tensors of `model_0.pt`, which must be all there is."""
    files = sorted(directory.glob(f"{_MODEL}_*.pt"))
    if len(files) > 1:
        raise BridgeError(
            f"{directory} has {few([path.name for path in files])} and no {METADATA}, which says how they belong "
            f"together; have the item {_MODEL!r} saved with a resharder"
        )
    (path,) = files
    root, find = _in_pickle(pool, path)
    tensors: Tensors = {}
    for at, tensor in _leaves(root, (), set()):
        name = _dotted(at)
        if tensor.whole is not None and tensor.whole != tensor.shape:
            raise BridgeError(
                f"{path} has {tensor.shape} of {name}, which is {tensor.whole}; the files of other ranks and "
                f"{METADATA} are not there"
            )
        if name in tensors:
            raise BridgeError(f"{path}: {name} appears twice")
        placed = find(at)
        tensors[name] = TensorMetadata.whole(name, placed.shape, placed.dtype, path, offset=placed.offset)
    return tensors


def _leaves(value: Any, path: Keys, seen: set[int]) -> Iterator[tuple[Keys, Tensor]]:
    """The tensors in nested dicts."""
    if isinstance(value, Tensor):
        yield path, value
    elif type(value) is dict:
        if id(value) in seen or len(path) == MOST_DIMS:  # two dicts could make up any number of tensors
            raise BridgeError(f"damaged pickle (a dict in several places, at {path!r:.100})")
        seen.add(id(value))
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key), seen)


def _in_safetensors(path: Path) -> Find:
    entries, _ = read_header(path)

    def find(at: Keys) -> Placed:
        if (entry := entries.get(_dotted(at))) is None:
            raise BridgeError(f"{path} has no {_dotted(at)}")
        return Placed(offset=entry.chunks[0].offset, shape=entry.shape, dtype=entry.dtype)

    return find


def _in_pickle(pool: FilePool, path: Path) -> tuple[Any, Find]:
    """What torch.save wrote, with a `Tensor` for each tensor, and what finds one."""
    length = size_of(path)
    with about(path):
        saved = Saved(pool.part(path, 0, length), length, allowed=_ALLOWED, most=_MOST_BYTES)

    def find(at: Keys) -> Placed:
        value = saved.root
        for part in at:
            value = value.get(part) if type(value) is dict else None
        if not isinstance(value, Tensor):
            raise BridgeError(f"{path} has no tensor {_dotted(at)}")
        with about(f"{path}: {_dotted(at)}"):
            return saved.place(value)

    return saved.root, find


def _dtensor(args: tuple[Any, ...]) -> Tensor:
    """The local tensor of a DTensor: (how it is made, DTensor, (DTensor, dtype, global shape, ...), (None, slots))."""
    made, state = args[2:] if len(args) == 4 else (None, None)
    whole = made[2] if type(made) is tuple and len(made) > 2 else None
    slots = state[1] if type(state) is tuple and len(state) == 2 else None
    local = slots.get("_local_tensor") if type(slots) is dict else None
    if type(whole) is not tuple or not isinstance(local, Tensor):
        raise BridgeError("a tensor of a class that is not DTensor")
    return replace(local, whole=whole)


_ALLOWED: dict[str, Any] = {
    "torch._tensor._rebuild_from_type_v2": _dtensor,
    "torch._utils._rebuild_wrapper_subclass": None,
    "torch.Size": size_from,
    **stand_ins("torch", "device"),
    **stand_ins("torch.serialization", "_get_layout"),
    **stand_ins(_DTENSOR, "DTensor"),
    **stand_ins(f"{_DTENSOR}._dtensor_spec", "DTensorSpec", "ShardOrderEntry", "TensorMeta"),
    **stand_ins(f"{_DTENSOR}.placement_types", "Replicate", "Shard", "_StridedShard"),
    **stand_ins("torch.distributed.device_mesh", "DeviceMesh"),
    **stand_ins(_MESH, "_FlatLayout", "_MeshLayout"),
}


def _get(data: Any, key: str, *kinds: type[T]) -> T:
    """A value of a dict. Raises BridgeError when it is not there, or of another type."""
    value = data.get(key) if type(data) is dict else None
    if type(value) not in kinds:
        raise BridgeError(f"damaged metadata (no {key})")
    return value  # type: ignore[return-value]


def _shape(data: Any, key: str) -> tuple[int, ...]:
    value = tuple(_get(data, key, list, tuple))
    if not is_shape(value):
        raise BridgeError(f"damaged metadata ({key})")
    return value


def _dotted(path: Keys) -> str:
    return ".".join(map(str, path))


def _path(text: Any) -> Keys:
    """`["layers.0.weight"]` as it stands in the metadata."""
    try:
        path = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        path = None
    if not isinstance(path, list) or not path or any(type(part) not in (str, int) for part in path):
        raise BridgeError(f"damaged metadata (the name {text!r:.100})")
    return tuple(path)
