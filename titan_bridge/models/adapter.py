"""What the rest of the package asks about a module: how it divides, what its attention computes, what its experts are.

An adapter belongs to the TorchTitan config class that builds the module; `adapters` has the table. This file does not
import TorchTitan, so that a family can be imported without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtitan.protocols.module import Module

    from titan_bridge.mesh import Sizes


@dataclass(frozen=True, kw_only=True)
class Division:
    """A size that a mesh axis must divide, e.g. ``axis="tp", name="n_heads", size=64``."""

    axis: str
    name: str
    size: int
    narrows: bool = False
    """Where the axis does not divide it, its module may be cut over fewer ranks instead: key-value heads."""


@dataclass(frozen=True, kw_only=True)
class InnerAttention:
    """What the inner attention of one layer computes. Head counts are global."""

    n_heads: int
    n_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    scale: float
    """Factor of q @ k, YaRN's included."""
    window: int | None = None
    """Tokens that a query sees, itself included; None for all."""
    sinks: bool = False
    """Whether the output is rescaled by a learned sink of each head (TorchTitan's ``out_transform``)."""


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Attention that expands a latent of each token to keys and values of all heads, and may cache the latent."""

    module: type[Module]
    """Of the same config and parameters; its ``forward`` gives the inner attention queries ``[T, N, H]``, normed
    latents ``[T, R]`` and rotated parts of the keys ``[T, 1, P]``, and takes ``[T, N * H of v]``."""
    expands: str
    """Name of the linear layer from latents to the other parts of the keys and to the values."""
    q_lora_rank: int | None
    kv_lora_rank: int
    """R."""
    qk_rope_head_dim: int
    """P."""

    @property
    def width(self) -> int:
        """Elements that are cached for a token."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """All that is special about the modules of one config class."""

    divides: Callable[[Any, Sizes], Iterable[Division]]
    """From the config and the parallel sizes of the module."""
    inner_attention: Callable[[Any], InnerAttention] | None = None
    """Attention only. What replaces ``inner_attention`` in the reference and in the engine is built from it."""
    latent: Callable[[Any], LatentAttention] | None = None
    """Attention with latents only."""
    keeps_dtype: type[Module] | None = None
    """Experts only: the class that computes in its weights' dtype; the fields of its config are the same."""


def adds_nothing(kind: type[Any], base: type[Any]) -> bool:
    """Whether a config class has the fields of `base` only and builds a module that overrides nothing of its module."""
    if {field.name for field in fields(kind)} != {field.name for field in fields(base)}:
        return False
    built: type[Any] = kind._owner
    between = built.__mro__[: built.__mro__.index(base._owner)]
    return not any(
        callable(value) for cls in between for name, value in vars(cls).items() if name != "Config"
    )
