"""One pure function from a layer to its plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from titan_bridge.mesh import Sizes
from titan_bridge.policy.schema import Policy


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a layer says of itself."""

    kind: str
    """A `schema.Kind`."""
    flavor: str | None = None
    """Of attention: "gqa" or "mla"."""
    divides: Mapping[str, int] = field(default_factory=dict)
    """Its sizes that tp cuts, by name: {"n_heads": 32, "n_kv_heads": 8}."""
    inside: tuple[str, Layer] | None = None
    """FQN and layer that it is a part of, whose plan it takes where no rule is for it: a shared expert's MoE."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """How one layer is split."""

    tp_size: int
    ep_size: int
    dcp_size: int
    rule: int | None
    """Index of the rule that decided; None: no rule is for this layer."""


def widest(layer: Layer, sizes: Sizes) -> int:
    """tp; for attention whose key-value heads it does not divide, the largest width that divides both.

    vLLM wants the query heads to divide by tp in any case.
    """
    if layer.kind != "attention" or max(layer.divides.values(), default=1) % sizes.tp:
        return sizes.tp
    return math.gcd(sizes.tp, *layer.divides.values())


DEFAULTS: Mapping[str, Callable[[Layer, Sizes], int]] = {
    "tp_size": widest,
    "ep_size": lambda layer, sizes: sizes.ep if layer.kind == "moe" else 1,
    "dcp_size": lambda layer, sizes: 1,
}
"""What a layer has that no rule says, by field of a plan."""


def resolve(layer: Layer, prefix: str, policy: Policy, sizes: Sizes) -> LayerPlan:
    """The plan of the layer with the FQN `prefix` in a model of `sizes`: that of the first rule that matches."""
    for at, rule in enumerate(policy.rules):
        if rule.match.fits(layer.kind, layer.flavor, prefix):
            axes = {**sizes.degrees, **policy.axes}
            asked = {
                name: axes[size] if isinstance(size, str) else size for name, size in rule.plan.given.items()
            }
            return LayerPlan(
                rule=at, **{name: asked.get(name) or make(layer, sizes) for name, make in DEFAULTS.items()}
            )
    if layer.inside is not None:
        fqn, outer = layer.inside
        return resolve(outer, fqn, policy, sizes)
    return LayerPlan(rule=None, **{name: make(layer, sizes) for name, make in DEFAULTS.items()})
