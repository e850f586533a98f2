"""The checkpoint that will be written: its files, and where in them each part of each tensor lies.

Everything here is arithmetic; nothing is read or written. A tensor is cut into strips of a few megabytes: its chunks,
as the planner sees them, each a run of bytes of one file. A strip is read, cast and written in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from titan_bridge.checkpoint.archive import ALIGNMENT, Archive
from titan_bridge.checkpoint.hf import header_bytes
from titan_bridge.sharding.boxes import Box
from titan_bridge.sharding.moves import Copy
from titan_bridge.sharding.plan import Plan
from titan_bridge.sharding.tensors import Chunk, TensorMetadata

CHUNK_BYTES = 256 << 20
"""Larger tensors are written to DCP in several chunks: who loads a part of one reads less of the rest."""
STRIP_BYTES = 4 << 20
"""Most bytes of a strip, of the destination's dtype. 8 MiB were measured to take a tenth more processor time, or a
sixth with twice as many threads as cores; with less than 4, planning takes longer."""
T = TypeVar("T")
Strip = tuple[str, int]  # tensor, and number of the strip


@dataclass(kw_only=True)
class OutFile:
    """A file, without its weights: its size, bytes that are known beforehand, and archives whose frames need a CRC."""

    name: str
    size: int = 0
    fixed: list[tuple[int, bytes]] = field(default_factory=list)  # (offset, bytes)
    archives: list[tuple[int, Archive]] = field(default_factory=list)  # (offset, archive)
    strips: list[Strip] = field(default_factory=list)  # in the order of the bytes


@dataclass(kw_only=True)
class Target:
    """All that will be written, but for small files at the end."""

    files: list[OutFile] = field(default_factory=list)
    strips: dict[str, list[Chunk]] = field(default_factory=dict)
    """By tensor, in the order of the planner's chunks; the owner is the name of a file."""
    shapes: dict[str, TensorMetadata] = field(default_factory=dict)  # all tensors, without their chunks
    archives: dict[str, TensorMetadata] = field(default_factory=dict)
    """DCP: what its metadata says of each entry, under all its names."""
    weight_map: dict[str, str] = field(default_factory=dict)  # Hugging Face: the file of each tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def tensors(self) -> list[TensorMetadata]:
        """Every tensor that has an element, in strips: the destination of a plan."""
        return [replace(self.shapes[name], chunks=tuple(s)) for name, s in self.strips.items() if s]

    def _place(self, tensor: TensorMetadata, file: OutFile, offset: int, box: Box) -> None:
        """A box of a tensor lies in a file from `offset` on."""
        strips = self.strips.setdefault(tensor.name, [])
        for strip in cut_rows(box, tensor.dtype.itemsize, STRIP_BYTES):
            file.strips.append((tensor.name, len(strips)))
            strips.append(Chunk(owner=file.name, box=strip, offset=offset))
            offset += strip.numel * tensor.dtype.itemsize


def copies_of(plan: Plan, file: str) -> dict[Strip, list[Copy]]:
    """What fills each strip of a file."""
    found: dict[Strip, list[Copy]] = {}
    for copy in plan.copies(destination=file):
        assert copy.destination_chunk is not None
        found.setdefault((copy.destination_name, copy.destination_chunk), []).append(copy)
    return found


def cut_rows(box: Box, itemsize: int, most: int) -> Iterator[Box]:
    """A box cut into boxes of at most `most` bytes (but at least one element), each contiguous where the box is.
    Rows of the first dim stay together; a row that is too large is cut further."""
    if not box.ndim or box.numel * itemsize <= most:
        if box.numel:
            yield box
        return
    row = Box(start=box.start[1:], stop=box.stop[1:])
    step = max(1, most // (row.numel * itemsize))
    for first in range(box.start[0], box.stop[0], step):
        last = min(first + step, box.stop[0])
        for part in cut_rows(row, itemsize, most):
            yield Box(start=(first, *part.start), stop=(last, *part.stop))


def hf_target(tensors: Sequence[TensorMetadata], most: int) -> Target:
    """Files of at most `most` bytes of weights (one larger tensor is a file of its own), named as transformers does."""
    groups = list(_grouped(tensors, most, lambda tensor: tensor.nbytes))
    target = Target(shapes={tensor.name: tensor for tensor in tensors})
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, offsets = header_bytes([(t.name, t.shape, t.dtype) for t in group], {"format": "pt"})
        size = len(header) + sum(tensor.nbytes for tensor in group)
        file = OutFile(name=name, size=size, fixed=[(0, header)])
        for tensor, offset in zip(group, offsets, strict=True):
            target._place(tensor, file, offset, Box.whole(tensor.shape))
            target.weight_map[tensor.name] = name
        target.files.append(file)
    return target


def dcp_target(
    tensors: Sequence[TensorMetadata],
    most: int,
    aliases: Mapping[str, str],
    blobs: Mapping[str, TensorMetadata],
) -> Target:
    """Files of at most `most` bytes of chunks. `aliases`: further names of tensors, same bytes. `blobs`: entries
    that are no tensors, by name, written as they are, each in one chunk without an archive."""
    target = Target(shapes={entry.name: entry for entry in (*blobs.values(), *tensors)})
    boxes: list[tuple[str, Box]] = [(name, Box.whole(blob.shape)) for name, blob in blobs.items()]
    for tensor in tensors:
        whole = Box.whole(tensor.shape)
        cut = list(cut_rows(whole, tensor.dtype.itemsize, CHUNK_BYTES))
        boxes += [(tensor.name, box) for box in cut or [whole]]
    chunks: dict[str, list[Chunk]] = {name: [] for name in target.shapes}
    sizes = {name: entry.dtype.itemsize for name, entry in target.shapes.items()}
    for number, group in enumerate(_grouped(boxes, most, lambda part: part[1].numel * sizes[part[0]])):
        file = OutFile(name=f"__0_{number}.distcp")
        for name, box in group:
            if pad := -file.size % ALIGNMENT:
                file.fixed.append((file.size, bytes(pad)))
                file.size += pad
            entry, start, length = target.shapes[name], file.size, None
            if name not in blobs:
                archive = Archive(box.shape, entry.dtype)
                file.archives.append((start, archive))
                start, length = start + archive.head_bytes, archive.total_bytes
            target._place(entry, file, start, box)
            chunks[name].append(Chunk(owner=Path(file.name), offset=file.size, archive=length, box=box))
            file.size += box.numel * sizes[name] if length is None else length
        target.files.append(file)
    for name, fqn in [*((name, name) for name in chunks), *aliases.items()]:
        target.archives[name] = replace(target.shapes[fqn], name=name, chunks=tuple(chunks[fqn]))
    return target


def _grouped(items: Iterable[T], most: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Runs of items of at most `most` bytes together; one that is larger stands alone."""
    group: list[T] = []
    total = 0
    for item in items:
        if group and total + size(item) > most:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group
