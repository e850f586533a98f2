"""What will be written: parts, their files, and where each box of each tensor lies in them.

A part is what is finished together: one file, or for engine files one file for every shard. It belongs to one
process. Everything here is arithmetic; nothing is read or written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from titan_bridge.checkpoint.archive import Archive
from titan_bridge.checkpoint.checkpoint import Blob
from titan_bridge.checkpoint.dcp_metadata import Written
from titan_bridge.checkpoint.engine_files import contiguous_parts, shard_label
from titan_bridge.checkpoint.safetensors import header_bytes
from titan_bridge.sharding.boxes import Box
from titan_bridge.sharding.layout import Layout

CHUNK_BYTES = 256 << 20
"""Larger tensors are written to DCP in several chunks: who loads a part of one reads less of the rest."""
_ALIGNMENT = 64
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One tensor of the destination."""

    name: str
    shape: tuple[int, ...]
    """Global shape."""
    dtype: torch.dtype
    align: int = 1
    """Rows of the first dim that belong together in the source (one head): cuts fall between such groups."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Place:
    """A box that lies in one file as a contiguous tensor of its own."""

    file: str
    offset: int
    """Bytes from the start of the file."""
    box: Box
    """In the global tensor."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A tensor, or a box of one, in a part. Its places cover the box once."""

    tensor: Wanted
    box: Box
    places: tuple[Place, ...]


@dataclass(kw_only=True)
class OutFile:
    """A file: its size, the bytes that are known beforehand, and the archives whose frames need a checksum."""

    name: str
    size: int = 0
    fixed: list[tuple[int, bytes]] = field(default_factory=list)
    """(offset, bytes)."""
    archives: list[tuple[int, Archive]] = field(default_factory=list)
    """(offset, archive)."""
    blobs: list[tuple[int, Blob]] = field(default_factory=list)
    """(offset, what to copy there as it is)."""


@dataclass(kw_only=True)
class Part:
    """Files that are finished together."""

    name: str
    files: list[OutFile]
    units: list[Unit]

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, kw_only=True)
class Target:
    """All that will be written, but for small files at the end."""

    parts: tuple[Part, ...]
    weight_map: Mapping[str, str] = field(default_factory=dict)
    """Hugging Face: the file of each tensor."""
    written: tuple[Written, ...] = ()
    """DCP: the entries of its metadata."""
    ranks: tuple[tuple[str, ...], ...] = ()
    """Engine files: the files of each rank."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(part.nbytes for part in self.parts)


def rows_of(box: Box, itemsize: int, most: int, align: int = 1) -> Iterator[Box]:
    """A box cut into boxes of at most `most` bytes (but at least one element), each contiguous where the box is.

    Rows of the first dim stay together; a row that is too large is cut further. Cuts fall on multiples of `align`
    of the first dim where that many rows fit.
    """
    if not box.ndim or box.numel * itemsize <= most:
        if box.numel:
            yield box
        return
    shape = box.shape
    row = math.prod(shape[1:]) * itemsize
    if row > most and len(shape) > 1:
        for i in range(box.start[0], box.stop[0]):
            for rest in rows_of(Box(start=box.start[1:], stop=box.stop[1:]), itemsize, most):
                yield Box(start=(i, *rest.start), stop=(i + 1, *rest.stop))
        return
    step = max(1, most // row)
    step = step // align * align or step
    first = box.start[0]
    while first < box.stop[0]:
        last = first + step
        last = min(
            last // align * align if step >= align and last // align * align > first else last, box.stop[0]
        )
        yield Box(start=(first, *box.start[1:]), stop=(last, *box.stop[1:]))
        first = last


def hf_target(tensors: Sequence[Wanted], most: int) -> Target:
    """Files of at most `most` bytes of weights (one larger tensor is a file of its own), named as transformers does."""
    groups = list(_grouped(tensors, most, lambda tensor: tensor.nbytes))
    parts, weight_map = [], {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        file, offsets = _safetensors_file(name, group, {"format": "pt"})
        units = [
            Unit(
                tensor=t,
                box=Box.whole(t.shape),
                places=(Place(file=name, offset=at, box=Box.whole(t.shape)),),
            )
            for t, at in zip(group, offsets, strict=True)
        ]
        weight_map |= dict.fromkeys((tensor.name for tensor in group), name)
        parts.append(Part(name=name, files=[file], units=units))
    return Target(parts=tuple(parts), weight_map=weight_map)


def dcp_target(
    tensors: Sequence[Wanted],
    most: int,
    *,
    aliases: Mapping[str, str],
    blobs: Mapping[str, Blob],
    chunk_bytes: int = CHUNK_BYTES,
) -> Target:
    """Files of at most `most` bytes of chunks.

    Args:
        aliases: Further names of tensors; their chunks are the same bytes.
        blobs: Entries that are no tensors, by name.
    """
    others: dict[str, list[str]] = {}
    for alias, fqn in aliases.items():
        others.setdefault(fqn, []).append(alias)
    chunks = [_Entry(fqns=(fqn,), blob=blob) for fqn, blob in blobs.items()]
    for tensor in tensors:
        boxes = list(rows_of(Box.whole(tensor.shape), tensor.dtype.itemsize, chunk_bytes, tensor.align))
        fqns = (tensor.name, *others.get(tensor.name, ()))
        chunks += [_Entry(fqns=fqns, tensor=tensor, box=box) for box in boxes or [Box.whole(tensor.shape)]]
    parts, written = [], []
    for number, group in enumerate(_grouped(chunks, most, lambda entry: entry.nbytes)):
        file = OutFile(name=f"__0_{number}.distcp")
        units = []
        for entry in group:
            file.size += -file.size % _ALIGNMENT
            start = file.size
            if entry.blob is not None:
                file.blobs.append((start, entry.blob))
                file.size += entry.blob.length
            elif entry.tensor is not None and entry.box is not None:
                archive = Archive(entry.box.shape, entry.tensor.dtype)
                file.archives.append((start, archive))
                place = Place(file=file.name, offset=start + archive.head_bytes, box=entry.box)
                units.append(Unit(tensor=entry.tensor, box=entry.box, places=(place,)))
                file.size += archive.total_bytes
            length = file.size - start
            written += [
                Written(fqn=fqn, file=file.name, offset=start, length=length, box=entry.box)
                for fqn in entry.fqns
            ]
        parts.append(Part(name=file.name, files=[file], units=units))
    return Target(parts=tuple(parts), written=tuple(written))


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One entry of a DCP file: a box of a tensor, or a blob; under all its names."""

    fqns: tuple[str, ...]
    tensor: Wanted | None = None
    box: Box | None = None
    blob: Blob | None = None

    @property
    def nbytes(self) -> int:
        if self.blob is not None:
            return self.blob.length
        assert self.tensor is not None
        assert self.box is not None
        return self.box.numel * self.tensor.dtype.itemsize


def engine_target(tensors: Sequence[Wanted], most: int, layout: Layout) -> Target:
    """Files of at most `most` bytes of weights for each shard of `layout`; `tensors` are its parameters."""
    shards = {tensor.name: _shards(tensor, layout) for tensor in tensors}
    held: dict[int, set[str]] = {rank: set() for rank in layout.ranks}
    parts: list[Part] = []
    files: dict[str, list[str]] = {}
    largest = {
        name: max(math.prod(shape) for shape, _, _ in found.values()) for name, found in shards.items()
    }
    # Wide dtypes first: then every tensor of a file is aligned to its own dtype.
    order = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    for number, group in enumerate(
        _grouped(order, most, lambda tensor: largest[tensor.name] * tensor.dtype.itemsize), start=1
    ):
        by_label: dict[str, list[tuple[Wanted, tuple[int, ...], int]]] = {}
        for tensor in group:
            for label, (shape, rank, ranks) in shards[tensor.name].items():
                by_label.setdefault(label, []).append((tensor, shape, rank))
                for holder in ranks:
                    held[holder].add(label)
        part = Part(name=f"model-{number:05d}", files=[], units=[])
        places: dict[str, list[Place]] = {tensor.name: [] for tensor in group}
        for label, entries in by_label.items():
            name = f"{part.name}.{label}.safetensors"
            local = [Wanted(name=t.name, shape=shape, dtype=t.dtype) for t, shape, _ in entries]
            file, offsets = _safetensors_file(name, local, {"format": "pt", "shard": label})
            part.files.append(file)
            files.setdefault(label, []).append(name)
            for (tensor, shape, rank), start in zip(entries, offsets, strict=True):
                places[tensor.name] += _pieces(layout, tensor, shape, rank, name, start)
        part.units = [
            Unit(tensor=tensor, box=Box.whole(tensor.shape), places=tuple(places[tensor.name]))
            for tensor in group
        ]
        parts.append(part)
    ranks = tuple(tuple(sorted(f for label in held[rank] for f in files[label])) for rank in layout.ranks)
    return Target(parts=tuple(parts), ranks=ranks)


def _shards(tensor: Wanted, layout: Layout) -> dict[str, tuple[tuple[int, ...], int, list[int]]]:
    """By label: local shape, one rank that holds it, all ranks that do."""
    found: dict[str, tuple[tuple[int, ...], int, list[int]]] = {}
    for rank in layout.mesh_of(tensor.name).ranks:
        label = shard_label(layout, tensor.name, rank)
        if label not in found:
            shape = layout.local_shape(tensor.name, rank)
            assert shape is not None
            found[label] = (shape, rank, [])
        found[label][2].append(rank)
    return found


def _pieces(
    layout: Layout, tensor: Wanted, shape: tuple[int, ...], rank: int, file: str, start: int
) -> Iterator[Place]:
    for piece in layout.pieces(tensor.name, rank):
        shift = [a - b for a, b in zip(piece.box.start, piece.local.start, strict=True)]
        for local, offset in contiguous_parts(piece.local, shape):
            yield Place(file=file, offset=start + offset * tensor.dtype.itemsize, box=local.shift(shift))


def _safetensors_file(
    name: str, tensors: Sequence[Wanted], metadata: Mapping[str, str]
) -> tuple[OutFile, list[int]]:
    header, offsets = header_bytes([(t.name, t.shape, t.dtype) for t in tensors], metadata)
    size = len(header) + sum(tensor.nbytes for tensor in tensors)
    return OutFile(name=name, size=size, fixed=[(0, header)]), offsets


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
