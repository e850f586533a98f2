"""Engine files: the local shards of every rank of an inference layout, which a rank reads from start to end.

    DIR/layout.json            the layout (see `titan_bridge.sharding.layout`), with global shapes as served
    DIR/engine.json            sizes, and the files of each rank
    DIR/config.json            and tokenizer files, as in a Hugging Face checkpoint
    DIR/model-00001.all.safetensors      what every rank holds in full
    DIR/model-00001.tp0.safetensors      what the ranks at tp=0 hold, and so on

A tensor in a file is what a rank holds of the TorchTitan parameter of that name. Ranks that hold the same share
the file, so no byte is stored twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from titan_bridge.checkpoint.checkpoint import Checkpoint, check_cover
from titan_bridge.checkpoint.files import inside
from titan_bridge.checkpoint.hf import read_config
from titan_bridge.checkpoint.safetensors import read_header
from titan_bridge.errors import BridgeError
from titan_bridge.json_file import read_json_object
from titan_bridge.mesh import base_and_stages, on_stages
from titan_bridge.sharding.boxes import Box, contiguous_stride, shard_dim
from titan_bridge.sharding.layout import Layout, dtype_name
from titan_bridge.sharding.tensors import Chunk, TensorMetadata

INDEX, LAYOUT = "engine.json", "layout.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EngineIndex:
    """engine.json."""

    sizes: Mapping[str, int]
    """dp, tp, ep, and pp if more than 1, that the files were cut for."""
    dense: str
    """"replicate" or "shard"."""
    rows: Mapping[str, int]
    """Rows of the model's own vocabulary in tensors that were padded to more."""
    ranks: tuple[tuple[str, ...], ...]
    """The files of each rank."""

    def write(self, path: Path) -> None:
        """Write engine.json at `path`."""
        data = {
            "version": VERSION,
            "sizes": dict(self.sizes),
            "dense": self.dense,
            "rows": dict(self.rows),
            "ranks": [list(files) for files in self.ranks],
        }
        path.write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> EngineIndex:
        """Read engine.json. Raises BridgeError for anything but what `write` wrote."""
        data = read_json_object(path)
        fields = {"version", "sizes", "dense", "rows", "ranks"}
        if set(data) != fields or data["version"] != VERSION:
            raise BridgeError(f"{path}: it must have exactly {sorted(fields)}, version {VERSION}")
        counts = [data["sizes"], data["rows"]]
        if not all(isinstance(d, dict) and all(type(n) is int and n > 0 for n in d.values()) for d in counts):
            raise BridgeError(f"{path}: sizes and rows must be objects of whole numbers")
        ranks = data["ranks"]
        if not isinstance(ranks, list) or not all(isinstance(files, list) for files in ranks):
            raise BridgeError(f"{path}: ranks must be a list of lists of files")
        return cls(
            sizes=data["sizes"],
            dense=str(data["dense"]),
            rows=data["rows"],
            ranks=tuple(tuple(files) for files in ranks),
        )


def is_engine(directory: Path) -> bool:
    """Whether the directory has engine files."""
    return (directory / INDEX).is_file()


def open_engine(directory: Path) -> Checkpoint:
    """Open engine files as one checkpoint of global tensors, without the rows that pad the vocabulary.

    Raises:
        BridgeError: Files that are missing, damaged, or not what layout and index say.
    """
    layout, index = Layout.read(directory / LAYOUT), EngineIndex.read(directory / INDEX)
    headers = _headers(directory, layout, index)
    first_rank: dict[str, int] = {}
    for rank, files in enumerate(index.ranks):
        for file in files:
            first_rank.setdefault(file, rank)
    chunks: dict[str, list[Chunk]] = {fqn: [] for fqn in layout.params}
    for file, rank in first_rank.items():
        for entry in headers[file].values():
            rows = index.rows.get(entry.name)
            chunks[entry.name] += _chunks(entry, layout, rank, rows)
    stored = {}
    for fqn, param in layout.params.items():
        rows = index.rows.get(fqn)
        shape = param.shape if rows is None else (rows, *param.shape[1:])
        check_cover(fqn, shape, [chunk.box for chunk in chunks[fqn]], directory)
        dtype = getattr(torch, param.dtype)
        stored[fqn] = TensorMetadata(name=fqn, shape=shape, dtype=dtype, chunks=tuple(chunks[fqn]))
    return Checkpoint(
        path=directory, format="engine", tensors=stored, config=read_config(directory), layout=layout
    )


def shard_label(layout: Layout, fqn: str, rank: int) -> str:
    """Names the part of `fqn` that `rank` holds, the same for all ranks that hold it: "all", "tp1", "efsdp0.ep3".

    Pipeline stages come first: "pp1.tp0".
    """
    mesh, placements = layout.mesh_of(fqn), layout.param(fqn).spec.placements
    coordinate = mesh.coordinate(rank)
    assert coordinate is not None, f"rank {rank} holds nothing of {fqn}"
    # "tp1of2": two ranks of a wider tp hold it together, so it is not what "tp1" is.
    narrow = f"of{mesh.shape[-1]}" if "tp_replicate" in mesh.axes else ""
    sharded = [
        f"{axis}{at}{narrow if axis == 'tp' else ''}"
        for axis, size, at, placement in zip(mesh.axes, mesh.shape, coordinate, placements, strict=True)
        if size > 1 and shard_dim(placement) is not None
    ]
    _, stages = base_and_stages(layout.param(fqn).spec.mesh)
    return ".".join([*([on_stages("", stages)[1:]] if stages else []), *sharded]) or "all"


def contiguous_parts(local: Box, shape: Sequence[int]) -> Iterator[tuple[Box, int]]:
    """A box inside a contiguous tensor of `shape` as boxes that lie in one run, each with its offset in elements."""
    stride = contiguous_stride(shape)
    # Behind `split` the box spans the whole dims, so one index of the dims before it is a run.
    split = max((d for d in range(len(shape)) if local.shape[d] != shape[d]), default=0)
    split = 0 if all(n == 1 for n in local.shape[:split]) else split
    parts = [local]
    for d in range(split):
        parts = [
            Box(start=(*p.start[:d], i, *p.start[d + 1 :]), stop=(*p.stop[:d], i + 1, *p.stop[d + 1 :]))
            for p in parts
            for i in range(p.start[d], p.stop[d])
        ]
    for part in parts:
        yield part, sum(a * s for a, s in zip(part.start, stride, strict=True))


def local_runs(layout: Layout, fqn: str, rank: int) -> Iterator[tuple[Box, int]]:
    """What a rank holds of a parameter: global boxes, each one run of its local tensor, at this offset in elements."""
    shape = layout.local_shape(fqn, rank) or ()
    for piece in layout.pieces(fqn, rank):
        shift = [a - b for a, b in zip(piece.box.start, piece.local.start, strict=True)]
        for local, offset in contiguous_parts(piece.local, shape):
            yield local.shift(shift), offset


def _headers(directory: Path, layout: Layout, index: EngineIndex) -> dict[str, dict[str, TensorMetadata]]:
    """Checked headers of all files, by file."""
    if layout.ranks != tuple(range(len(index.ranks))):
        raise BridgeError(
            f"{directory}: {INDEX} lists {len(index.ranks)} ranks, {LAYOUT} has {len(layout.ranks)}"
        )
    headers: dict[str, dict[str, TensorMetadata]] = {}
    on_mesh = {name: set(mesh.ranks) for name, mesh in layout.meshes.items()}
    counts = dict.fromkeys(layout.meshes, 0)
    for param in layout.params.values():
        counts[param.spec.mesh] += 1
    for rank, files in enumerate(index.ranks):
        names: set[str] = set()
        for file in files:
            if file not in headers:
                headers[file], _ = read_header(inside(directory, file, INDEX))
            names |= headers[file].keys()
        wanted = sum(count for name, count in counts.items() if rank in on_mesh[name])
        if not names <= layout.params.keys() or len(names) != wanted:
            raise BridgeError(
                f"{directory}: the files of rank {rank} hold {len(names)} tensors, {LAYOUT} {wanted}"
            )
    return headers


def _chunks(entry: TensorMetadata, layout: Layout, rank: int, rows: int | None) -> Iterator[Chunk]:
    param, shape = layout.param(entry.name), layout.local_shape(entry.name, rank)
    if shape is None or entry.shape != shape or dtype_name(entry.dtype) != param.dtype:
        raise BridgeError(
            f"{entry.chunks[0].path}: {entry.name} is {entry.dtype} {entry.shape}; {LAYOUT} gives rank {rank} "
            f"{param.dtype} {shape}"
        )
    for box, offset in local_runs(layout, entry.name, rank):
        if rows is not None:
            cut = box.intersect(Box(start=(0,) * box.ndim, stop=(rows, *param.shape[1:])))
            if cut is None:
                continue
            box = cut
        yield replace(entry.chunks[0], box=box, offset=entry.chunks[0].offset + offset * entry.dtype.itemsize)
