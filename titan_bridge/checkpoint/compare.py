"""Two checkpoints under common names: what only one of them has, and how far apart the values are.

Checkpoints of one format are compared under their own names. Of two formats, and for fingerprints, the names are
Hugging Face's: each side is planned as if it were to be converted, and its strips are read instead of written.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from titan_bridge.checkpoint import hf
from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.execute import strip_workers
from titan_bridge.checkpoint.mapping import cast, make_mapping, same_names
from titan_bridge.checkpoint.model_dir import weights_directory
from titan_bridge.checkpoint.open import open_checkpoint
from titan_bridge.checkpoint.quantized import dequantized
from titan_bridge.checkpoint.target import Strip, copies_of, hf_target
from titan_bridge.errors import BridgeError, few
from titan_bridge.fingerprint import combine, of_box, seal
from titan_bridge.models import family_for
from titan_bridge.sharding.boxes import Box
from titan_bridge.sharding.plan import plan
from titan_bridge.sharding.tensors import TensorMetadata
from titan_bridge.sharding.view import View

_PART_BYTES = 1 << 30  # bytes of the tensors whose copies are listed at a time
Advance = Callable[[int], None]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Side:
    """An open checkpoint with its tensors under the names that are compared."""

    source: Checkpoint
    tensors: Mapping[str, TensorMetadata]  # by name: global shape and dtype; not in chunks
    views: tuple[View, ...] = ()
    left_out: tuple[str, ...] = ()
    """Tensors that are not compared: they have no Hugging Face name, or repeat another tensor (a tied head)."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far apart two tensors of equal shape are, in float64."""

    name: str
    elements: int
    different: int  # elements with another value; NaN equals NaN, and 0.0 equals -0.0
    not_finite: int  # those of them that are NaN or infinite on one side; the figures below leave them out
    max: float
    mean: float  # over all elements


def open_sides(
    paths: Sequence[str], *, config: str | None = None, common: bool = False, names: Sequence[str | None] = ()
) -> tuple[Side, ...]:
    """Open checkpoints for a comparison: model folders of any format, training runs, or steps of one.

    Args:
        config: A directory with the model's config.json, for where no path has one.
        common: Use Hugging Face's names wherever the model is known, even between checkpoints of one format.
        names: For each of `paths`, as for `open_checkpoint`.

    Raises BridgeError: no checkpoint, a damaged one, different formats without a config.json, or one that does not fit.
    """
    hf_config = None if config is None else hf.read_config(Path(config))
    if config is not None and hf_config is None:
        raise BridgeError(f"--config {config} has no config.json")
    with contextlib.ExitStack() as closed_on_error:
        opened: list[Checkpoint] = []
        for path, pattern in itertools.zip_longest(paths, names):
            source = open_checkpoint(weights_directory(path) or path, names=pattern)
            if source.format == "hf" and source.config is None and config is not None:
                source = dequantized(source, hf_config, f"--config {config}")
            opened.append(closed_on_error.enter_context(source))
            hf_config = hf_config or source.config or hf.read_config(source.path.parent)
        formats = {source.format for source in opened}
        if hf_config is None and len(formats) > 1:
            raise BridgeError(
                f"{few([str(source.path) for source in opened])}: {few(sorted(formats))} are compared through the "
                "model's config.json, which none of them has; give one with --config"
            )
        plain = hf_config is None or (not common and len(formats) == 1)
        sides = tuple(_side(one, None if plain and one.format != "hf" else hf_config) for one in opened)
        closed_on_error.pop_all()
        return sides


def _side(source: Checkpoint, config: Mapping[str, Any] | None) -> Side:
    """A checkpoint under Hugging Face's names, or under its own without a config."""
    own = {tensor.name: tensor for tensor in same_names(source, None).tensors}
    if config is None:
        return Side(source=source, tensors=own)
    if source.format == "hf":
        repeated: set[str] = set()
        with contextlib.suppress(BridgeError):  # a model that nobody here knows can be compared all the same
            repeated = {view.name for view in family_for(config).optional_views(config)} & own.keys()
        own = {name: tensor for name, tensor in own.items() if name not in repeated}
        return Side(source=source, tensors=own, left_out=tuple(sorted(repeated)))
    made = make_mapping(source, config, None)
    tensors = {tensor.name: tensor for tensor in made.tensors}
    return Side(source=source, tensors=tensors, views=made.views, left_out=made.left_out)


def differences(
    one: Side, other: Side, *, dtype: torch.dtype | None = None, advance: Advance = lambda count: None
) -> Iterator[Difference]:
    """Compare all tensors of the same name and shape, both cast to `dtype` first, in a few strips of 4 MiB a thread.
    `advance` is told of bytes compared, from any thread."""
    both = [(tensor, other.tensors.get(name)) for name, tensor in one.tensors.items()]
    same = [tensor for tensor, found in both if found is not None and found.shape == tensor.shape]
    reads = [_Reader(side, same, dtype) for side in (one, other)]

    def compare(strip: Strip) -> tuple[int, int, float, float]:
        found = _difference(*(read(strip) for read in reads))
        advance(reads[0].nbytes(strip))
        return found

    for name, parts in reads[0].each_tensor(compare):
        elements = Box.whole(one.tensors[name].shape).numel
        yield Difference(
            name=name,
            elements=elements,
            different=sum(part[0] for part in parts),
            not_finite=sum(part[1] for part in parts),
            max=max((part[2] for part in parts), default=0.0),
            mean=sum(part[3] for part in parts) / max(elements, 1),
        )


def _difference(one: torch.Tensor, other: torch.Tensor) -> tuple[int, int, float, float]:
    """(different, not finite, maximum, sum) of two flat tensors."""
    if one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
        return 0, 0, 0.0, 0.0
    # float64 has no room for all of int64.
    exact = not one.is_floating_point() and not other.is_floating_point()
    a, b = (one.long(), other.long()) if exact else (one.double(), other.double())
    equal = (a == b) | (a.isnan() & b.isnan())
    distance = (a - b).double().abs_().masked_fill_(equal, 0)
    odd = ~distance.isfinite()
    distance.masked_fill_(odd, 0)
    return int((~equal).sum()), int(odd.sum()), float(distance.max()), float(distance.sum())


def fingerprints(
    side: Side, *, dtype: torch.dtype | None = None, advance: Advance = lambda count: None
) -> Iterator[tuple[str, int]]:
    """The fingerprint of every tensor, 0 to 2^64 - 1 (see `titan_bridge.fingerprint`), floats cast to `dtype`.
    `advance` is told of bytes read, from any thread."""
    read = _Reader(side, list(side.tensors.values()), dtype)

    def count(strip: Strip) -> int:
        box, shape = read.box(strip), side.tensors[strip[0]].shape
        found = of_box(read(strip).view(box.shape), box, shape)
        advance(read.nbytes(strip))
        return found

    for name, parts in read.each_tensor(count):
        tensor = side.tensors[name]
        yield name, seal(combine(parts), tensor.shape, read.dtypes[name])


class _Reader:
    """Reads the tensors of one side strip by strip; both sides of a comparison have the same strips."""

    def __init__(self, side: Side, tensors: Sequence[TensorMetadata], dtype: torch.dtype | None) -> None:
        self._side = side
        self.dtypes = {tensor.name: cast(side.tensors[tensor.name].dtype, dtype) for tensor in tensors}
        # Strips of float64 elements: what a comparison holds of them.
        self._target = hf_target([replace(tensor, dtype=torch.float64) for tensor in tensors], _PART_BYTES)
        self._strips = {tensor.name: tensor for tensor in self._target.tensors()}
        made = plan(
            side.source.tensors.values(), self._strips.values(), side.views, allow_missing=bool(side.views)
        )
        if lost := next(iter(made.missing), None):
            raise BridgeError(f"{lost}: some of its elements are in no tensor of {side.source.path}")
        # Files come in turn: only the copies of the one at hand are kept.
        self._copies = functools.lru_cache(maxsize=1)(functools.partial(copies_of, made))

    def box(self, strip: Strip) -> Box:
        return self._strips[strip[0]].chunks[strip[1]].box

    def nbytes(self, strip: Strip) -> int:
        """Bytes of a strip in the checkpoint."""
        return self.box(strip).numel * self._side.tensors[strip[0]].dtype.itemsize

    def __call__(self, strip: Strip) -> torch.Tensor:
        """A strip, flat."""
        chunk = self._strips[strip[0]].chunks[strip[1]]
        buffer = torch.empty(chunk.box.numel, dtype=self.dtypes[strip[0]])
        for copy in self._copies(str(chunk.owner)).get(strip, ()):
            self._side.source.fetch(copy, copy.destination_window.of(buffer))
        return buffer

    def each_tensor(self, work: Callable[[Strip], T]) -> Iterator[tuple[str, list[T]]]:
        """Run `work` on every strip, on several threads; by tensor, what it returned."""
        with strip_workers(min(8, len(os.sched_getaffinity(0)))) as pool:
            yield from ((name, []) for name in self.dtypes if name not in self._strips)  # without elements
            for file in self._target.files:
                found: dict[str, list[T]] = {}
                self._copies(file.name)
                for strip, result in zip(file.strips, pool.map(work, file.strips), strict=True):
                    found.setdefault(strip[0], []).append(result)
                yield from found.items()
