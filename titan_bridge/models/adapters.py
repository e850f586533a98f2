"""The adapters of all config classes, and what is done with them to a config tree.

An adapter is found by the class of a module's config, wherever in the tree it stands. A subclass shares it if it adds
nothing. Attention and experts must have one; other modules need none unless tp or ep divide them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, cast

from torchtitan.models.common.attention import BaseAttention, GQAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.protocols.module import Module

from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes
from titan_bridge.models import Family, families
from titan_bridge.models.adapter import Adapter, Division, InnerAttention, LatentAttention, adds_nothing
from titan_bridge.models.attention import PlainAttention
from titan_bridge.models.experts import KeepDtypeGroupedExperts


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """One module of a config tree that has an adapter."""

    fqn: str
    config: Any
    adapter: Adapter
    parent: Any
    """The config or list that holds it."""
    attribute: str | int

    def replace(self, config: Any) -> None:
        """Put another config in its place, in the tree."""
        if isinstance(self.parent, list):
            self.parent[cast(int, self.attribute)] = config
        else:
            setattr(self.parent, cast(str, self.attribute), config)


def window_of(config: BaseAttention.Config) -> int | None:
    """The sliding window that the config of an inner attention states."""
    inner = config.inner_attention
    if isinstance(inner, PlainAttention.Config):
        return inner.window
    if isinstance(inner, VarlenAttention.Config) and inner.window_size[0] >= 0:
        return inner.window_size[0] + 1
    return None


def head_divisions(config: Any, sizes: Sizes) -> Iterator[Division]:
    """For attention whose query and key-value heads are sharded over tp."""
    yield Division(axis="tp", name="n_heads", size=config.n_heads)
    kv_heads = config.n_kv_heads or config.n_heads
    yield Division(axis="tp", name="n_kv_heads", size=kv_heads, narrows=True)


def expert_divisions(config: GroupedExperts.Config, sizes: Sizes) -> Iterator[Division]:
    """For routed experts: spread over ep, or else their hidden dim over tp."""
    yield Division(axis="ep", name="num_experts", size=config.num_experts)
    if sizes.ep == 1:
        yield Division(axis="tp", name="moe_intermediate_size", size=config.hidden_dim)


def _ffn_divisions(config: FeedForward.Config, sizes: Sizes) -> Iterator[Division]:
    yield Division(axis="tp", name="intermediate_size", size=config.w1.out_features)


def grouped_query_attention(config: GQAttention.Config) -> InnerAttention:
    """Inside of `GQAttention` and of what computes like it."""
    head_dim = config.head_dim or config.dim // config.n_heads
    return InnerAttention(
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads or config.n_heads,
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
        scale=head_dim**-0.5,
        window=window_of(config),
    )


COMMON: Mapping[type, Adapter] = {
    GQAttention.Config: Adapter(divides=head_divisions, inner_attention=grouped_query_attention),
    GroupedExperts.Config: Adapter(divides=expert_divisions, keeps_dtype=KeepDtypeGroupedExperts),
    FeedForward.Config: Adapter(divides=_ffn_divisions),
}
"""Adapters of the classes that several families use; each family adds those of its own."""


def table() -> Mapping[type, Adapter]:
    """Config class to adapter. The variants that keep their dtype are in it under the adapter that names them."""
    return _table(families())


@cache
def _table(families: tuple[Family, ...]) -> Mapping[type, Adapter]:
    named = dict(COMMON)
    for family in families:
        try:
            own = family.adapters()
        except Exception as error:  # another package's: models of other families do without it
            warnings.warn(f"adapters of family {family.name!r} cannot be used: {error!r}", stacklevel=2)
            continue
        named = {**own, **named}  # nobody replaces what other families use
    variants = [adapter for adapter in named.values() if adapter.keeps_dtype is not None]
    return named | {cast(Any, adapter.keeps_dtype).Config: adapter for adapter in variants}


def adapter_for(config: Module.Config, fqn: str) -> Adapter | None:
    """The adapter of a module's config.

    Raises:
        BridgeError: Attention or experts of a class that has none, or that adds something to one that has.
    """
    kind = type(config)
    special = isinstance(config, (BaseAttention.Config, GroupedExperts.Config))
    known = table()
    base = next((parent for parent in kind.__mro__ if parent in known), None)
    if base is not None and (not special or adds_nothing(kind, base)):
        return known[base]
    if special:
        what = (
            "has no adapter" if base is None else f"adds to {base.__qualname__}, whose adapter would drop it"
        )
        raise BridgeError(
            f"{fqn}: {kind.__module__}.{kind.__qualname__} {what}; give it one in Family.adapters()"
        )
    return None


def adapted(config: Decoder.Config) -> list[Adapted]:
    """Every module of a config tree that has an adapter, in the tree's order.

    Raises:
        BridgeError: As `adapter_for`.
    """
    found = []
    for fqn, module, parent, attribute in config.traverse(Module.Config, recurse=True):
        adapter = adapter_for(cast(Module.Config, module), fqn)
        if adapter is not None:
            assert attribute is not None, "the root of a tree is a decoder"
            found.append(Adapted(fqn=fqn, config=module, adapter=adapter, parent=parent, attribute=attribute))
    return found


def divisions(config: Decoder.Config, sizes: Sizes) -> list[tuple[str, Division]]:
    """Every size in a config tree that an axis of its module must divide, with the FQN of the module."""
    return [
        (one.fqn, division)
        for one in adapted(config)
        for division in one.adapter.divides(one.config, sizes.at(one.fqn))
    ]


def inner_attention(config: BaseAttention.Config) -> InnerAttention:
    """What the inner attention of an attention config computes."""
    adapter = adapter_for(config, "attention")
    assert adapter is not None
    assert adapter.inner_attention is not None
    return adapter.inner_attention(config)


def latent_attention(config: BaseAttention.Config) -> LatentAttention | None:
    """How an attention config caches latents; None if it has none."""
    adapter = adapter_for(config, "attention")
    return adapter.latent(config) if adapter is not None and adapter.latent is not None else None


def keep_expert_dtype(config: Decoder.Config) -> None:
    """Let all routed experts of a tree compute in their weights' dtype, in place; call it again freely."""
    for one in adapted(config):
        variant = one.adapter.keeps_dtype
        if variant is not None and type(one.config) is not variant.Config:
            stated = {
                field.name: getattr(one.config, field.name) for field in fields(one.config) if field.init
            }
            one.replace(variant.Config(**stated))


def use_plain_attention(config: Decoder.Config) -> None:
    """Let all inner attention of a tree be `PlainAttention`, in place; call it again freely."""
    for one in adapted(config):
        if one.adapter.inner_attention is not None:
            window = one.adapter.inner_attention(one.config).window
            one.replace(replace(one.config, inner_attention=PlainAttention.Config(window=window)))
