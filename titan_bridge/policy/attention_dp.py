"""How many groups of ranks attention data parallelism makes, and what that means for how attention is cut.

Each group computes attention for requests of its own, so attention is cut over the `tp / groups` ranks of a group, and
each group holds its weights. What a rank caches of a token does not grow as long as tp held copies of the heads anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from titan_bridge.errors import BridgeError
from titan_bridge.mesh import divisors
from titan_bridge.policy.resolve import Layer, LayerPlan


def attention_groups(asked: bool | int, layers: Mapping[str, Layer], tp: int) -> int:
    """The number of groups: `asked`, or for true as many as tp would hold copies of the cache; 1 is none.

    Latents count as one key-value head.

    Raises:
        BridgeError: a number that tp or the heads do not allow.
    """
    attentions = [layer for layer in layers.values() if layer.kind == "attention"]
    if asked is True:
        return tp // math.gcd(
            tp, *(1 if each.flavor == "mla" else math.gcd(*each.divides.values()) for each in attentions)
        )
    if asked is False:
        return 1
    heads = {name: size for each in attentions for name, size in each.divides.items()}
    allowed = [n for n in divisors(tp) if not any(size % (tp // n) for size in heads.values())]
    if asked not in (1, *allowed):
        said = ", ".join(f"{name}={size}" for name, size in heads.items())
        raise BridgeError(
            f"attention_dp={asked} does not fit tp={tp} and {said}: it must divide tp, and the ranks of a group the "
            f"heads; allowed: true, {', '.join(map(str, allowed))}"
        )
    return asked


def check_groups(groups: int, tp: int, layers: Mapping[str, Layer], plans: Mapping[str, LayerPlan]) -> None:
    """Refuse groups where a rule cuts attention over other than the ranks of a group.

    Raises:
        BridgeError: the first such layer.
    """
    for fqn, layer in layers.items():
        if groups > 1 and layer.kind == "attention" and plans[fqn].tp_size != tp // groups:
            raise BridgeError(
                f"attention_dp={groups} cuts attention over tp/{groups} = {tp // groups} ranks, but parallelism says "
                f"tp_size={plans[fqn].tp_size} for {fqn}; change one"
            )
