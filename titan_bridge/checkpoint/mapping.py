"""Which tensors the destination has and which source tensors fill them, for every pair of formats.

Names come in three kinds: Hugging Face's; TorchTitan's as its state dicts and DCP have them (wq, wk, wv); and those
of the live model in the engine (one wqkv). The families' views lead from the first to the other two; views between
those two are composed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from titan_bridge.checkpoint.checkpoint import Checkpoint, Format
from titan_bridge.checkpoint.dcp import METADATA
from titan_bridge.errors import BridgeError, few
from titan_bridge.sharding.tensors import TensorMetadata
from titan_bridge.sharding.view import View

if TYPE_CHECKING:
    from titan_bridge.models import Family

_MOST = 8
"""Names in one message."""


_BIASES = (".expert_bias_E", ".e_score_correction_bias")
"""Ends of the names of expert biases, which choose experts and stay float32 whatever the weights are."""


@dataclass(frozen=True, kw_only=True)
class TensorMap:
    """The destination's tensors and the views that fill them."""

    tensors: tuple[TensorMetadata, ...]
    """Not yet in chunks."""
    views: tuple[View, ...] = ()
    empty: Mapping[str, int] = field(default_factory=dict)
    """Elements of destination tensors that no source has and that become zero: rows that pad the vocabulary,
    biases that Hugging Face does not know."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """DCP: further names of tied tensors."""
    buffers: frozenset[str] = frozenset()
    """Tensors of the destination that keep their own dtype whatever the weights have (expert biases)."""
    dropped: tuple[str, ...] = ()
    """Source tensors that the destination has no place for."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Rows of a tensor's first dim that belong together in the source (one head)."""


def views_of(
    family: Family, hf: Mapping[str, Any], form: Format, padded_vocab: int | None = None
) -> tuple[View, ...]:
    """The Hugging Face tensors as views of TorchTitan's, under the names that DCP or the engine has."""
    return family.views(hf, padded_vocab=padded_vocab, fused_qkv=form == "engine")


def separate_qkv_views(family: Family, hf: Mapping[str, Any], padded_vocab: int) -> tuple[View, ...]:
    """wq, wk and wv, as state dicts and models without a fused projection have them, as views of the live wqkv."""
    views, _ = _between(family, hf, "dcp", "engine", padded_vocab)
    return tuple(view for view in views if view.name != view.fqn)


def expected(family: Family, hf: Mapping[str, Any], form: Format) -> dict[str, tuple[int, ...]]:
    """Names and global shapes of the tensors that a checkpoint of this format must have."""
    if form == "hf":
        return {view.name: view.shape for view in family.views(hf)}
    return {view.fqn: view.titan_shape for view in views_of(family, hf, form)}


def check_source(
    source: Checkpoint, family: Family, hf: Mapping[str, Any], buffers: Mapping[str, Any]
) -> list[str]:
    """Hold a checkpoint against the model that its config describes; returns the tensors that are not needed.

    Raises:
        BridgeError: Every missing, unexpected or mis-shaped tensor and every dtype that is no floating point, in
            one line.
    """
    wanted = expected(family, hf, source.format)
    problems, left = [], []
    if missing := [name for name in wanted if name not in source.tensors]:
        problems.append(f"missing: {few(missing, _MOST)}")
        if source.elsewhere:
            problems.append(f"{METADATA} has tensors under other names: {few(source.elsewhere, _MOST)}")
    known = (
        set(family.tied_names(hf)) if source.format != "hf" else {v.name for v in family.optional_views(hf)}
    )
    unexpected = []
    for name, stored in source.tensors.items():
        if name in wanted:
            if stored.shape != wanted[name]:
                problems.append(f"{name} has shape {stored.shape}, config.json says {wanted[name]}")
            if not stored.dtype.is_floating_point:
                problems.append(f"{name} has dtype {stored.dtype}; weights are floating-point")
            elif stored.dtype.itemsize == 1:
                problems.append(f"{name} has dtype {stored.dtype}; quantized weights are not read")
        elif name in known or name in buffers or (source.format == "hf" and family.ignores(name, hf)):
            left.append(name)
        else:
            unexpected.append(f"{name} {stored.shape}")
    if unexpected:
        problems.append(f"unexpected: {few(unexpected, _MOST)}")
    if problems:
        raise BridgeError(f"{source.path} does not fit {family.name}: {few(problems, _MOST, '; ')}")
    return left


def same_names(source: Checkpoint, dtype: torch.dtype | None) -> TensorMap:
    """The destination has what the source has (Hugging Face to Hugging Face, DCP to DCP)."""
    tensors = [
        replace(s, chunks=(), dtype=s.dtype if s.name.endswith(_BIASES) else cast(s.dtype, dtype))
        for s in source.tensors.values()
    ]
    return TensorMap(tensors=tuple(tensors))


def views_between(
    source: Checkpoint, family: Family, hf: Mapping[str, Any], form: Format, padded_vocab: int | None = None
) -> tuple[tuple[View, ...], dict[str, tuple[int, ...]]]:
    """The views between a checkpoint's tensors and those of another format, and the latter's shapes, in order.

    Args:
        source: What `check_source` accepted.
        padded_vocab: Rows of the embedding where `form` is the engine's.
    """
    if source.format == "hf":
        views = views_of(family, hf, form, padded_vocab)
        return views, {view.fqn: view.titan_shape for view in views}
    if form == "hf":
        views = views_of(family, hf, source.format)
        return views, {view.name: view.shape for view in views}
    return _between(family, hf, source.format, form, padded_vocab)


def make_mapping(
    source: Checkpoint,
    family: Family,
    hf: Mapping[str, Any],
    form: Format,
    *,
    dtype: torch.dtype | None,
    buffers: Mapping[str, tuple[int, ...]],
    padded_vocab: int | None = None,
) -> TensorMap:
    """Between different formats, or to engine files of other sizes.

    Args:
        source: What `check_source` accepted.
        form: Of the destination.
        dtype: Of the destination's weights; else they keep their own.
        buffers: FQN to shape of TorchTitan's float32 buffers. Those without a view may be in TorchTitan checkpoints
            only.
        padded_vocab: Rows of the embedding in engine files.
    """
    views, shapes = views_between(source, family, hf, form, padded_vocab)
    fillers = _fillers(views, form, source)
    aliases = dict(family.tied_names(hf)) if form == "dcp" else {}
    tensors, empty, rows = [], {}, {}
    known = [view for view in family.views(hf) if view.fqn in buffers]
    mapped = {view.name if form == "hf" else view.fqn for view in known}
    buffers = {fqn: shape for fqn, shape in buffers.items() if fqn not in {view.fqn for view in known}}
    for name in shapes:
        sources = fillers.get(name) or [(name, 1)]
        dtypes = {cast(source.tensor(filler).dtype, dtype) for filler, _ in sources}
        if name in mapped:
            dtypes = {torch.float32}
        if len(dtypes) > 1:
            raise BridgeError(
                f"{name} is put together from {', '.join(sorted(map(str, dtypes)))}; choose one with --dtype"
            )
        rows[name] = max(together for _, together in sources)
        tensors.append(TensorMetadata(name=name, shape=shapes[name], dtype=dtypes.pop()))
        lacking = math.prod(shapes[name]) - sum(math.prod(source.tensor(s).shape) for s, _ in sources)
        if form != "hf" and lacking > 0:
            empty[name] = lacking
    dropped = [name for name in source.tensors if name in buffers]
    kept = buffers if form == "dcp" or (form == "engine" and dropped) else {}
    if kept:
        for fqn, shape in buffers.items():
            if fqn in source.tensors:
                dropped.remove(fqn)
            else:
                empty[fqn] = math.prod(shape)
            tensors.append(TensorMetadata(name=fqn, shape=shape, dtype=torch.float32))
    return TensorMap(
        tensors=tuple(tensors),
        views=views,
        empty=empty,
        aliases=aliases,
        buffers=frozenset(kept) | mapped,
        dropped=tuple(dropped),
        rows=rows,
    )


def cast(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype` for floating-point tensors, their own for others and without a `dtype`."""
    return dtype if dtype is not None and own.is_floating_point else own


def _fillers(views: Sequence[View], form: Format, source: Checkpoint) -> dict[str, list[tuple[str, int]]]:
    """By destination tensor: the source tensors that fill it, with the rows of it that belong together."""
    result: dict[str, list[tuple[str, int]]] = {}
    for view in views:
        titan_rows = math.prod(view.factors[0][1:])
        sizes = view.index_shape
        external_rows = math.prod(sizes[dim] for dim in view.groups[0][1:]) if view.groups else 1
        if view.name in source.tensors and form != "hf" and _fills(view, source):
            result.setdefault(view.fqn, []).append((view.name, titan_rows))
        elif view.fqn in source.tensors:
            result.setdefault(view.name, []).append((view.fqn, external_rows))
    return result


def _fills(view: View, source: Checkpoint) -> bool:
    """Whether the external side of a view is the source's."""
    return source.tensors[view.name].shape == view.shape


def _between(
    family: Family, hf: Mapping[str, Any], own: Format, form: Format, padded_vocab: int | None
) -> tuple[tuple[View, ...], dict[str, tuple[int, ...]]]:
    """Views and shapes between the two kinds of TorchTitan names."""
    fused = {view.name: view for view in views_of(family, hf, "engine", padded_vocab)}
    other = {view.name: view for view in views_of(family, hf, "dcp" if "dcp" in (own, form) else "engine")}
    views: dict[tuple[str, str], View] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, live in fused.items():
        plain = other[name]
        if (plain.fqn, plain.titan_shape) != (live.fqn, live.titan_shape):
            views.setdefault((plain.fqn, live.fqn), compose(plain, live))
        target = plain if form == "dcp" else live
        shapes[target.fqn] = target.titan_shape
    return tuple(views.values()), shapes


def compose(plain: View, live: View) -> View:
    """`plain`'s whole TorchTitan tensor as a view of `live`'s, given that both are views of one external tensor.

    Raises:
        BridgeError: `plain` is a slice only, or the two do not cut the external tensor in a common way.
    """
    if plain.index_shape != plain.flat_factors:
        raise BridgeError(
            f"{plain.fqn} holds more than {plain.name}; it cannot be seen as a view of {live.fqn}"
        )
    sizes = live.index_shape
    cells = [dim for dim in live.permute if sizes[dim] > 1]
    # In the order of the external tensor, each factor of `plain` is a run of cells of `live`.
    runs: dict[int, list[int]] = {}
    for dim in plain.permute:
        run, product = [], 1
        while cells and product < plain.flat_factors[dim]:
            run.append(cells.pop(0))
            product *= sizes[run[-1]]
        if product != plain.flat_factors[dim]:
            raise BridgeError(f"{plain.fqn} and {live.fqn} do not cut {plain.name} alike")
        runs[dim] = run
    order = [cell for dim in range(len(plain.flat_factors)) for cell in runs[dim]]
    order += [dim for dim in range(len(sizes)) if dim not in order]  # cells of one element have no place
    return View(
        name=plain.fqn,
        fqn=live.fqn,
        shape=plain.titan_shape,
        factors=live.factors,
        index=live.index,
        permute=tuple(order),
    )
