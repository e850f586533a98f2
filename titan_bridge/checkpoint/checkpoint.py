"""What a checkpoint is to the rest of the package: named tensors, and where in which file each part lies."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch

from titan_bridge.checkpoint.archive import Placed, locate
from titan_bridge.checkpoint.files import FilePool
from titan_bridge.errors import BridgeError, about
from titan_bridge.sharding.boxes import Box
from titan_bridge.sharding.moves import Copy, Window
from titan_bridge.sharding.tensors import Chunk, TensorMetadata

Format = Literal["hf", "dcp"]
_MOST_CUT = 8  # dims along which one tensor may be cut into chunks


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint: headers were read and checked, weights were not. Close it, or use it in a `with`."""

    path: Path
    format: Format
    tensors: Mapping[str, TensorMetadata]
    """Model tensors by name: Hugging Face names, or TorchTitan FQNs (DCP)."""
    config: Mapping[str, Any] | None = None  # parsed config.json, where there is one
    extra_tensors: Mapping[str, TensorMetadata] = field(default_factory=dict)
    """DCP: optimizer state and whatever else is no model tensor."""
    blobs: Mapping[str, TensorMetadata] = field(default_factory=dict)
    """DCP: entries that are no tensors, as bytes (uint8, one chunk, which is not looked into)."""
    paths: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """DCP: where each of `extra_tensors` and `blobs` stands in the nested state dict."""
    left_out: int = 0  # DCP: entries that are no model tensors and were not looked up
    elsewhere: tuple[str, ...] = ()
    """DCP: those of them that are tensors under a key that neither the model nor the training state has."""
    pool: FilePool = field(default_factory=FilePool)
    _located: dict[tuple[Path, int], Placed] = field(default_factory=dict, repr=False)
    """Archives that were looked into, by file and offset."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.pool.close()

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far."""
        return self.pool.bytes_read

    @property
    def nbytes(self) -> int:
        """Bytes of all model tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())

    @property
    def entries(self) -> dict[str, TensorMetadata]:
        """Model tensors, extra tensors and blobs."""
        return {**self.blobs, **self.extra_tensors, **self.tensors}

    def tensor(self, name: str) -> TensorMetadata:
        """One entry of any kind. Raises BridgeError when there is none of this name."""
        found = self.tensors.get(name) or self.extra_tensors.get(name) or self.blobs.get(name)
        if found is None:
            raise BridgeError(f"{self.path} has no tensor {name!r} (it has {len(self.tensors)} others)")
        return found

    def locate(self, stored: TensorMetadata, chunk: Chunk) -> int:
        """The byte of the chunk's file at which its tensor starts. An archive is read (its headers) the first time.
        Raises BridgeError: an archive that is damaged, or holds another tensor than the metadata says."""
        if chunk.archive is None:
            return chunk.offset
        key, dtype, shape = (chunk.path, chunk.offset), stored.dtype, chunk.box.shape
        with about(f"{chunk.path}: {stored.name} at {chunk.box.start}"):
            if key not in self._located:
                self._located[key] = locate(self.pool.part(*key, chunk.archive), chunk.archive)
            found = self._located[key]
            if (found.dtype, found.shape) != (dtype, shape):
                raise BridgeError(f"it has {found.dtype} {found.shape}, the metadata says {dtype} {shape}")
        return chunk.offset + found.offset

    def fetch(self, copy: Copy, out: torch.Tensor) -> None:
        """Execute a copy whose source is this checkpoint. `out`: the destination's window, cast to its dtype."""
        self.fetch_window(*self.source_of(copy), copy.source_window, out)

    def fetch_window(self, stored: TensorMetadata, chunk: Chunk, window: Window, out: torch.Tensor) -> None:
        """Copy a window of one chunk into `out` (the window's size, any strides), casting to its dtype."""
        self.pool.fetch(chunk.path, self.locate(stored, chunk), stored.dtype, window, out)

    def source_of(self, copy: Copy) -> tuple[TensorMetadata, Chunk]:
        """What a copy reads."""
        assert copy.source_chunk is not None
        return (stored := self.tensor(copy.source_name)), stored.chunks[copy.source_chunk]

    def read_into(self, name: str, box: Box, out: torch.Tensor) -> None:
        """Copy a box (global coordinates) of a tensor into `out` (the box's shape, any strides, any dtype).
        Raises BridgeError: no such tensor, a box outside it, another shape, or a file that ended early."""
        stored = self.tensor(name)
        if not Box.whole(stored.shape).contains(box) or tuple(out.shape) != box.shape:
            raise BridgeError(f"{name}: box {box} into {tuple(out.shape)}; the tensor is {stored.shape}")
        # Replicas hold the same.
        for chunk in {chunk.box: chunk for chunk in reversed(stored.chunks)}.values():
            if (common := chunk.box.intersect(box)) is not None:
                window = Window.of_box(common.relative_to(chunk.box.start), chunk.box.shape)
                target = out[common.relative_to(box.start).slices]
                self.fetch_window(stored, chunk, window, target)

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """A whole tensor, or a box of it (global coordinates), in its own dtype."""
        stored = self.tensor(name)
        box = box or Box.whole(stored.shape)
        out = torch.empty(box.shape, dtype=stored.dtype)
        self.read_into(name, box, out)
        return out


def check_cover(name: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Raise BridgeError unless the distinct boxes tile a tensor of global `shape` exactly."""
    whole = Box.whole(shape)
    distinct = list(dict.fromkeys(box for box in boxes if box.numel))
    if outside := [box for box in distinct if box.ndim != len(shape) or not whole.contains(box)]:
        raise BridgeError(f"{name} has a part {outside[0]} outside its shape {shape}")
    cut = [d for d in range(len(shape)) if any(b.start[d] or b.stop[d] != shape[d] for b in distinct)]
    if len(cut) > _MOST_CUT:
        raise BridgeError(f"{name} is cut along {len(cut)} dims; at most {_MOST_CUT} are read")
    if _corners(distinct, cut) != _corners([whole] if whole.numel else [], cut):
        held = sum(box.numel for box in distinct)
        what = "overlap" if held >= whole.numel else f"hold {held} of {whole.numel} elements"
        raise BridgeError(f"the parts of {name} {what}; they must cover {shape} once")


def _corners(boxes: Iterable[Box], dims: Sequence[int]) -> dict[tuple[int, ...], int]:
    """How often each corner occurs, negative for those with an odd number of ends in them; zeros left out.
    These are the differences along every dim of "how many boxes hold this element". So they are those of the whole
    tensor where each element is held once, and nowhere else, and the time is in proportion to the boxes."""
    counts: Counter[tuple[int, ...]] = Counter()
    for box in boxes:
        ends = [((box.start[d], 1), (box.stop[d], -1)) for d in dims]
        for corner in itertools.product(*ends):
            counts[tuple(at for at, _ in corner)] += math.prod(sign for _, sign in corner)
    return {corner: count for corner, count in counts.items() if count}
