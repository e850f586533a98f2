"""How many groups of ranks attention data parallelism makes, and what that means for how attention is cut.

Each group computes attention for requests of its own, so within a group attention is cut over `tp / groups` ranks, and
its weights are held once by each group. What a rank caches of a token does not grow as long as tp held copies anyway.
"""

from __future__ import annotations

import math

from torchtitan.models.common.decoder import Decoder

from titan_bridge.errors import BridgeError
from titan_bridge.mesh import divisors
from titan_bridge.models.adapters import inner_attention, latent_attention
from titan_bridge.policy.layers import Split, layers_of


def cached_heads(config: Decoder.Config) -> list[int]:
    """Key-value heads of each layer; latents count as one."""
    attentions = [layer.attention for layer in config.layers]
    return [1 if latent_attention(each) else inner_attention(each).n_kv_heads for each in attentions]


def attention_groups(asked: bool | int, config: Decoder.Config, tp: int) -> int:
    """The number of groups: `asked`, or for true as many as tp would hold copies of the cache; 1 is none.

    Raises:
        BridgeError: a number that tp or the heads do not allow.
    """
    if asked is True:
        return tp // math.gcd(tp, *cached_heads(config))
    if asked is False:
        return 1
    heads = {
        name: size
        for layer in layers_of(config).values()
        if layer.kind == "attention"
        for name, size in layer.divides.items()
    }
    allowed = [n for n in divisors(tp) if not any(size % (tp // n) for size in heads.values())]
    if asked not in allowed:
        said = ", ".join(f"{name}={size}" for name, size in heads.items())
        raise BridgeError(
            f"attention_dp={asked} does not fit tp={tp} and {said}: it must divide tp, and the ranks of a group the "
            f"heads; allowed: true, {', '.join(map(str, allowed))}"
        )
    return asked


def check_groups(groups: int, split: Split) -> None:
    """Refuse groups whose attention is not cut over exactly their ranks.

    Raises:
        BridgeError: the first such layer.
    """
    if groups == 1:
        return
    width = split.sizes.tp // groups
    if not split.layers:
        raise BridgeError(f"attention_dp={groups} needs a family that takes a policy for each layer")
    for fqn, layer in split.layers.items():
        if layer.kind == "attention" and split.plans[fqn].tp_size != width:
            raise BridgeError(
                f"attention_dp={groups} cuts attention over tp/{groups} = {width} ranks, but parallelism says "
                f"tp_size={split.plans[fqn].tp_size} for {fqn}; change one"
            )
