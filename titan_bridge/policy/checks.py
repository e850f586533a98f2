"""What a policy may not ask of a model, and what is worth a remark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes, divisors
from titan_bridge.policy.resolve import Layer, LayerPlan
from titan_bridge.policy.schema import Policy


def check_axes(policy: Policy, sizes: Sizes) -> None:
    """Raise BridgeError where an axis of the policy contradicts the sizes that the model is started with."""
    for name, size in policy.axes.items():
        real = sizes.degrees.get(name, size)
        if real != size:
            raise BridgeError(f"parallelism.axes.{name}={size}, but the model is started with {name}={real}")
    axes = {**sizes.degrees, **policy.axes}
    if {"attn_tp", "dcp"} <= axes.keys() and axes["attn_tp"] * axes["dcp"] != sizes.tp:
        raise BridgeError(
            f"parallelism.axes: attn_tp={axes['attn_tp']} times dcp={axes['dcp']} is not tp={sizes.tp}; change one"
        )


def check_plan(
    policy: Policy,
    sizes: Sizes,
    layers: Mapping[str, Layer],
    plans: Mapping[str, LayerPlan],
    tied: Sequence[str],
) -> None:
    """Raise BridgeError for the first layer whose plan cannot be followed. `tied` layers share one parameter."""
    for fqn, plan in plans.items():
        layer, where = layers[fqn], _where(policy, plan, fqn)
        if sizes.tp % plan.tp_size:
            raise BridgeError(
                f"{where}: tp_size={plan.tp_size} does not divide tp={sizes.tp}; allowed: {_listed(divisors(sizes.tp))}"
            )
        bad = [f"{name}={size}" for name, size in layer.divides.items() if size % plan.tp_size]
        # Whole experts are spread over ep, and what no rule says is refused as it is without a policy.
        if bad and plan.rule is not None and not (layer.kind == "moe" and sizes.ep > 1):
            fit = [n for n in divisors(sizes.tp) if not any(size % n for size in layer.divides.values())]
            raise BridgeError(
                f"{where}: tp_size={plan.tp_size} does not divide {_listed(bad)}; allowed: {_listed(fit)}"
            )
        if plan.dcp_size > 1:
            raise BridgeError(
                f"{where}: dcp_size={plan.dcp_size} needs an attention that returns log-sum-exps, to merge "
                "the ranks of a sequence; vLLM's CPU backend has none, and elsewhere it is not built; allowed: 1"
            )
        if layer.kind == "moe" and plan.ep_size != sizes.ep:
            raise BridgeError(
                f"{where}: ep_size={plan.ep_size}, but ep={sizes.ep} ranks share all experts; allowed: {sizes.ep}"
            )
        if layer.kind == "moe" and sizes.ep > 1 and plan.tp_size != sizes.tp:
            raise BridgeError(
                f"{where}: tp_size={plan.tp_size}, but experts over ep={sizes.ep} add up over all tp ranks; allowed: "
                f"{sizes.tp}"
            )
        if layer.kind == "shared_expert" and layer.inside is not None:
            outer = plans[layer.inside[0]].tp_size
            if plan.tp_size != outer:
                raise BridgeError(
                    f"{where}: tp_size={plan.tp_size}, but a shared expert adds to its MoE's partial sums; allowed: "
                    f"{outer}, as {layer.inside[0]} has"
                )
    widths = {fqn: plans[fqn].tp_size for fqn in tied}
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{fqn} tp_size={width}" for fqn, width in widths.items())
        raise BridgeError(f"parallelism: {said}, but they are one parameter here; give both the same")


def remarks_on(
    policy: Policy, sizes: Sizes, layers: Mapping[str, Layer], plans: Mapping[str, LayerPlan]
) -> Iterator[str]:
    """Rules that decide nothing, and what it costs that there are too few heads."""
    for at, rule in enumerate(policy.rules):
        if any(plan.rule == at for plan in plans.values()):
            continue
        fits = any(rule.match.fits(layer.kind, layer.flavor, fqn) for fqn, layer in layers.items())
        why = "every layer that it matches is decided by an earlier rule" if fits else "it matches no layer"
        yield f"parallelism.rules.{at} ({rule.match}) does nothing: {why}"
    forced: dict[tuple[int, str], int] = {}
    for fqn, plan in plans.items():
        if plan.rule is None and plan.tp_size < sizes.tp and layers[fqn].kind == "attention":
            heads = _listed(f"{name}={size}" for name, size in layers[fqn].divides.items())
            forced[plan.tp_size, heads] = forced.get((plan.tp_size, heads), 0) + 1
    for (width, heads), count in forced.items():
        yield (
            f"attention of {count} layers is cut over {width} of tp={sizes.tp} ranks, because {heads}; its weights and "
            f"KV cache are held {sizes.tp // width} times"
        )


def _where(policy: Policy, plan: LayerPlan, fqn: str) -> str:
    rule = (
        "no rule" if plan.rule is None else f"parallelism.rules.{plan.rule} ({policy.rules[plan.rule].match})"
    )
    return f"{rule} for {fqn}"


def _listed(items) -> str:
    return ", ".join(map(str, items))
