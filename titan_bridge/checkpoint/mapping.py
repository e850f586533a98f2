"""Which tensors the destination has and which source tensors fill them.

Names come in three kinds: Hugging Face's; TorchTitan's as its state dicts and DCP have them (wq, wk, wv); and those
of the live model in the engine (one wqkv). The families' views lead from the first to the other two; views from DCP's
names to those of the live model are composed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from titan_bridge.checkpoint.checkpoint import Checkpoint, Format
from titan_bridge.checkpoint.dcp import METADATA
from titan_bridge.errors import BridgeError, few
from titan_bridge.models import family_for
from titan_bridge.sharding.tensors import TensorMetadata
from titan_bridge.sharding.view import View

if TYPE_CHECKING:
    from titan_bridge.models import Family

Config = Mapping[str, Any]  # a parsed config.json
_MOST = 8  # names in one message
EXPERT_BIAS = ".expert_bias_E"  # end of TorchTitan's name of the buffer
_BIASES = (EXPERT_BIAS, ".e_score_correction_bias")
"""Ends of the names of expert biases, which choose experts and stay float32 whatever the weights are."""


@dataclass(frozen=True, kw_only=True)
class TensorMap:
    """The destination's tensors and the views that fill them."""

    tensors: tuple[TensorMetadata, ...]  # not yet in chunks
    views: tuple[View, ...] = ()
    zero: frozenset[str] = frozenset()
    """Destination tensors that no source has and that become zero: expert biases that Hugging Face does not know."""
    aliases: Mapping[str, str] = field(default_factory=dict)  # DCP: further names of tied tensors
    buffers: frozenset[str] = frozenset()
    """Tensors of the destination that keep their own dtype whatever the weights have (expert biases)."""
    dropped: tuple[str, ...] = ()  # source tensors that the destination has no place for
    left_out: tuple[str, ...] = ()
    """Those, and others that are not needed: they repeat another tensor (a tied head), say."""


def live_views(form: Format, family: Family, hf: Config, padded_vocab: int) -> tuple[View, ...]:
    """The tensors of a checkpoint as views of the live model's, whose embedding has `padded_vocab` rows."""
    live = family.views(hf, padded_vocab=padded_vocab)
    if form == "hf":
        return live
    plain = {view.name: view for view in family.views(hf, fused_qkv=False)}
    composed = {}
    for view in live:
        own = plain[view.name]
        if (own.fqn, own.titan_shape) != (view.fqn, view.titan_shape):
            composed.setdefault((own.fqn, view.fqn), (own, view))
    return tuple(compose(*pair) for pair in composed.values())


def separate_qkv_views(family: Family, hf: Config, padded_vocab: int) -> tuple[View, ...]:
    """wq, wk and wv, as state dicts and models without a fused projection have them, as views of the live wqkv."""
    return tuple(view for view in live_views("dcp", family, hf, padded_vocab) if view.name != view.fqn)


def expected(family: Family, hf: Config, form: Format) -> dict[str, tuple[int, ...]]:
    """Names and global shapes of the tensors that a checkpoint of this format must have."""
    if form == "hf":
        return {view.name: view.shape for view in family.views(hf)}
    return {view.fqn: view.titan_shape for view in family.views(hf, fused_qkv=False)}


def check_source(source: Checkpoint, family: Family, hf: Config, buffers: Mapping[str, Any]) -> list[str]:
    """Hold a checkpoint against the model that its config describes; returns the tensors that are not needed.
    Raises BridgeError: every missing, unexpected or mis-shaped tensor and every dtype of no weight, in one line."""
    wanted = expected(family, hf, source.format)
    problems, left = [], []
    if missing := [name for name in wanted if name not in source.tensors]:
        problems.append(f"missing: {few(missing, _MOST)}")
        if source.elsewhere:
            problems.append(f"{METADATA} has tensors under other names: {few(source.elsewhere, _MOST)}")
    known = {v.name for v in family.optional_views(hf)} if source.format == "hf" else family.tied_names(hf)
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
    buffers = frozenset(name for name in source.tensors if name.endswith(_BIASES))
    dtypes = {s.name: None if s.name in buffers else dtype for s in source.tensors.values()}
    tensors = (replace(s, chunks=(), dtype=cast(s.dtype, dtypes[s.name])) for s in source.tensors.values())
    return TensorMap(tensors=tuple(tensors), buffers=buffers)


def make_mapping(source: Checkpoint, hf: Config, dtype: torch.dtype | None) -> TensorMap:
    """From Hugging Face to DCP, or from DCP to Hugging Face; weights become `dtype`. Raises as `check_source`."""
    family = family_for(hf)
    buffers = family.expert_biases(hf)  # those without a view are in TorchTitan's checkpoints only
    left = check_source(source, family, hf, buffers)
    to: Format = "dcp" if source.format == "hf" else "hf"
    views = family.views(hf, fused_qkv=False)
    mapped = {view.name if to == "hf" else view.fqn for view in views if view.fqn in buffers}
    unmapped = {fqn: shape for fqn, shape in buffers.items() if fqn not in {view.fqn for view in views}}
    fillers: dict[str, list[str]] = {}
    for view in views:
        name, filler = (view.name, view.fqn) if to == "hf" else (view.fqn, view.name)
        fillers.setdefault(name, []).append(filler)
    tensors = []
    for name, shape in expected(family, hf, to).items():
        dtypes = {cast(source.tensor(filler).dtype, dtype) for filler in fillers[name]}
        if name in mapped:
            dtypes = {torch.float32}
        if len(dtypes) > 1:
            found = ", ".join(sorted(map(str, dtypes)))
            raise BridgeError(f"{name} is put together from {found}; choose one with --dtype")
        tensors.append(TensorMetadata(name=name, shape=shape, dtype=dtypes.pop()))
    if to == "dcp":
        tensors += [TensorMetadata(name=n, shape=shape, dtype=torch.float32) for n, shape in unmapped.items()]
    zero = frozenset(unmapped if to == "dcp" else ())
    dropped = tuple(name for name in source.tensors if name in unmapped)
    return TensorMap(
        tensors=tuple(tensors),
        views=views,
        zero=zero,
        aliases=dict(family.tied_names(hf)) if to == "dcp" else {},
        buffers=zero | mapped,
        dropped=dropped,
        left_out=tuple(sorted({*dropped, *left})),
    )


def cast(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype` for floating-point tensors, their own for others and without a `dtype`."""
    return dtype if dtype is not None and own.is_floating_point else own


def compose(plain: View, live: View) -> View:
    """`plain`'s whole TorchTitan tensor as a view of `live`'s, given that both are views of one external tensor.
    Raises BridgeError: `plain` is a slice only, or the two do not cut the external tensor in a common way."""
    if plain.index_shape != plain.flat_factors:
        raise BridgeError(f"{plain.fqn} holds more than {plain.name}; it is no view of {live.fqn}")
    # In the order of the external tensor, each factor of `plain` is a run of factored dims of `live`.
    cut = replace(live, shape=tuple(plain.flat_factors[dim] for dim in plain.permute))
    runs = dict(zip(plain.permute, cut.groups, strict=True))
    order = [own for dim in range(len(runs)) for own in runs[dim]]
    order += [own for own in live.permute if own not in order]  # dims of one element have no place
    return replace(live, name=plain.fqn, shape=plain.titan_shape, permute=tuple(order))
