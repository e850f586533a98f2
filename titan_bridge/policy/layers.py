"""The layers of a TorchTitan config tree, and the sizes of a model after a policy has decided on each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.moe import MoE
from torchtitan.protocols.module import Module

from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes
from titan_bridge.models.adapters import adapted, divisions
from titan_bridge.models.family import Family
from titan_bridge.policy.attention_dp import attention_groups, check_groups
from titan_bridge.policy.checks import check_axes, check_plan, remarks_on
from titan_bridge.policy.resolve import Layer, LayerPlan, resolve
from titan_bridge.policy.schema import NO_POLICY, Policy, attention_width


@dataclass(frozen=True, kw_only=True)
class Split:
    """A model's layers, the plan of each, by FQN, and the sizes that follow."""

    sizes: Sizes
    """Those of the model, with a width for each layer that is cut over fewer ranks than tp."""
    layers: Mapping[str, Layer]
    plans: Mapping[str, LayerPlan]
    remarks: tuple[str, ...]
    """Rules that decide nothing, and attention that is narrower than tp without a rule."""
    policy: Policy = NO_POLICY
    """The rules that decided: what was given, or one for attention that follows from the groups."""
    groups: int = 1
    """Groups of ranks whose attention has requests of its own; 1 without attention data parallelism."""


def layers_of(config: Decoder.Config) -> dict[str, Layer]:
    """FQN to layer of all that a policy can split, in the order of a forward."""
    cut: dict[str, dict[str, int]] = {}
    for fqn, division in divisions(config, Sizes()):
        if division.axis == "tp":
            cut.setdefault(fqn, {})[division.name] = division.size
    found: dict[str, Layer] = {}
    for fqn, _, _, _ in config.traverse(MoE.Config, recurse=True):
        inside = [sizes for part, sizes in cut.items() if part.startswith(f"{fqn}.")]
        found[fqn] = Layer(kind="moe", divides={name: n for sizes in inside for name, n in sizes.items()})
    for one in adapted(config):
        divides, outer = cut.get(one.fqn, {}), one.fqn.rpartition(".")[0]
        if one.adapter.inner_attention is not None:
            flavor = "gqa" if one.adapter.latent is None else "mla"
            found[one.fqn] = Layer(kind="attention", flavor=flavor, divides=divides)
        elif isinstance(one.config, FeedForward.Config):
            around = (outer, found[outer]) if outer in found else None
            found[one.fqn] = Layer(kind="shared_expert" if around else "mlp", divides=divides, inside=around)
    order = {fqn: at for at, (fqn, _, _, _) in enumerate(config.traverse(Module.Config, recurse=True))}
    layers = dict(sorted(found.items(), key=lambda item: order[item[0]]))
    return {"tok_embeddings": Layer(kind="embedding"), **layers, "lm_head": Layer(kind="lm_head")}


def split(
    policy: Policy, family: Family, config: Decoder.Config, sizes: Sizes, *, attention_dp: bool | int = False
) -> Split:
    """Decide on every layer of a model; `attention_dp` is true or the number of groups.

    Raises:
        BridgeError: a rule that the model, its family or its sizes do not allow; one line with rule and value.
    """
    if not family.takes_policy:
        if policy or attention_dp is True or attention_dp > 1:
            raise BridgeError(
                f"parallelism: family {family.name!r} takes no policy; allowed: no rules and no attention_dp, or "
                "takes_policy = True in the family, if each of its layers enters and leaves whole"
            )
        return Split(sizes=sizes, layers={}, plans={}, remarks=())
    layers = layers_of(config)
    groups = attention_groups(attention_dp, layers, sizes.tp)
    if groups > 1 and not policy:
        policy = attention_width(sizes.tp // groups)
    check_axes(policy, sizes)
    plans = {fqn: resolve(layer, fqn, policy, sizes) for fqn, layer in layers.items()}
    tied = ("tok_embeddings", "lm_head") if config.enable_weight_tying else ()
    check_plan(policy, sizes, layers, plans, tied)
    check_groups(groups, sizes.tp, layers, plans)
    narrow = tuple((fqn, plan.tp_size) for fqn, plan in plans.items() if plan.tp_size < sizes.tp)
    return Split(
        sizes=replace(sizes, widths=narrow),
        layers=layers,
        plans=plans,
        remarks=tuple(remarks_on(policy, sizes, layers, plans)),
        policy=policy,
        groups=groups,
    )
