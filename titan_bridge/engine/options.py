"""Our options inside vLLM: `additional_config={"titan": {...}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from titan_bridge.errors import BridgeError
from titan_bridge.policy.read import policy_from
from titan_bridge.policy.schema import NO_POLICY, Policy

TRANSFER_BACKEND = "titan"
"""In vLLM's `weight_transfer_config`."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class TitanOptions:
    """What `additional_config.titan` may say."""

    dense: Literal["replicate", "shard"] = "replicate"
    """Dense weights on each dp rank: a whole copy, or `1/dp` of them, gathered layer by layer."""
    ep: int | None = None
    """Expert-parallel size if not `dp * tp`: a divisor of that and of the experts, with `enable_expert_parallel`."""
    step: int | None = None
    """Of a training run's folder, the checkpoint to serve; the last whole one if not given."""
    names: str | None = None
    """How the checkpoint calls the tensor NAME, with `{}` in place of NAME, where another program wrote it."""
    mla: Literal["auto", "latent", "expanded"] = "auto"
    """What attention with latents caches: a token's latent, or the keys and values of all heads, which any backend can.
    "auto" takes the latter on CPUs, where vLLM's latent attention has neither prefix caching nor chunked prefill, and
    with sharded dense weights."""
    parallelism: Policy = NO_POLICY
    """How each layer is split over the tp ranks: `axes` and `rules`."""
    attention_dp: bool | int = False
    """Groups of tp ranks that attend for requests of their own; true: as many as tp would hold copies of the cache."""
    cpu_pack: bool = True
    """On the CPU backend in bfloat16, compute with packed copies of linear weights, which is faster. With weight
    transfer the plain ones stay beside them: twice the memory."""
    cpu_experts_once: bool = False
    """On CPUs without AMX, hold routed experts in one packed layout: half their memory, and about twice the time for
    steps of few tokens. With AMX there is only one."""
    attach_specs: bool = False
    """Declare ShardingSpecs on vLLM's own models too (`model_impl` other than `torchtitan`). On the CPU backend their
    linears then keep plain weights, which are slower than vLLM's packed ones."""

    def shards(self, dp: int) -> bool:
        """Whether `dp` ranks keep a part of the dense weights each and gather them layer by layer."""
        return self.dense == "shard" and dp > 1


def titan_options(additional_config: Any) -> TitanOptions:
    """The options in a vLLM `additional_config`; defaults where it has no `titan` table.

    Raises:
        BridgeError: An unknown key or a value of the wrong type, named with what is allowed.
    """
    given = additional_config.get("titan", {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        raise BridgeError(
            f"additional_config.titan is {given!r}; it must be a table such as {{'dense': 'shard'}}"
        )
    known = ", ".join(TitanOptions.__dataclass_fields__)
    values = {str(key): value for key, value in given.items()}
    if (shorthand := _enables_attention_dp(additional_config)) is not None:
        if values.get("attention_dp", shorthand) is not shorthand:
            raise BridgeError(
                f"additional_config.{_SHORTHAND} is {shorthand}, and additional_config.titan.attention_dp is "
                f"{values['attention_dp']!r}; leave one out"
            )
        values["attention_dp"] = shorthand
    if "parallelism" in values:
        values["parallelism"] = policy_from(values["parallelism"], "additional_config.titan.parallelism")
    try:
        return TitanOptions(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise BridgeError(f"unknown key additional_config.titan.{key}; allowed: {known}") from None
        raise BridgeError(f"additional_config.titan.{key} is {first['input']!r}: {first['msg']}") from None


_SHORTHAND = "sharding.sharding_strategy.enable_dp_attention"
"""How tpu-inference spells it in `additional_config`."""


def _enables_attention_dp(additional_config: Any) -> bool | None:
    """What tpu-inference's spelling says; None where it is not used."""
    place, path = additional_config, []
    for key in _SHORTHAND.split("."):
        if not isinstance(place, Mapping) or key not in place:
            return None
        path.append(key)
        if path[0] == "sharding" and len(path) > 1 and (others := set(place) - {key}):
            raise BridgeError(
                f"unknown key additional_config.{'.'.join([*path[:-1], min(map(str, others))])}; allowed: {_SHORTHAND}"
            )
        place = place[key]
    if place not in (0, 1):
        raise BridgeError(f"additional_config.{_SHORTHAND} is {place!r}; allowed: 0, 1, true, false")
    return bool(place)
