"""What a parallelism policy says: rules that match layers and give them sizes; the first that matches a layer wins.

The same structure stands in a TOML file (`[parallelism]`), under `additional_config.titan.parallelism`, and in a YAML
or JSON file for `--policy` (below the key `parallelism_rules`). Importing this needs pydantic and nothing of torch.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from titan_bridge.mesh import Sizes

_CONFIG = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
_Count = Annotated[int, Field(ge=1)]
_Text = Annotated[str, Field(min_length=1)]
_Size = _Count | _Text
Kind = Literal[
    "attention", "mlp", "moe", "shared_expert", "embedding", "lm_head", "indexer", "mamba", "mtp"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Match:
    """Which layers a rule is for: those that fit all that is given."""

    kind: Kind | None = None
    """What the layer is."""
    attention_flavor: Literal["gqa", "mla"] | None = None
    """Of attention: grouped heads, or latents."""
    prefix_pattern: _Text | None = None
    """Glob on the layer's FQN, for instance "layers.0.*"."""

    def __post_init__(self) -> None:
        if all(value is None for value in vars(self).values()):
            raise ValueError("match says nothing; give kind, attention_flavor or prefix_pattern")
        if self.attention_flavor and self.kind not in (None, "attention"):
            raise ValueError(f"attention_flavor is for kind attention, not {self.kind}")

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items() if value is not None)

    def fits(self, kind: str, flavor: str | None, fqn: str) -> bool:
        """Whether a layer is one of those."""
        return (
            self.kind in (None, kind)
            and self.attention_flavor in (None, flavor)
            and (self.prefix_pattern is None or fnmatchcase(fqn, self.prefix_pattern))
        )

    def covers(self, other: Match) -> bool:
        """Whether it fits every layer that `other` fits, as far as the two can tell without a model."""
        kind = other.kind or ("attention" if other.attention_flavor else None)
        pattern, theirs = self.prefix_pattern or "*", other.prefix_pattern or "*"
        return (
            self.kind in (None, kind)
            and self.attention_flavor in (None, other.attention_flavor)
            # A pattern whose only wildcards are stars and that matches another as a text matches all that it matches.
            and (pattern == theirs or (not set(pattern) & set("?[") and fnmatchcase(theirs, pattern)))
        )


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class RulePlan:
    """Sizes for the layers of a rule: a number or the name of an axis. What is left out stays as it is without it."""

    tp_size: _Size | None = None
    """Consecutive tp ranks that the layer is cut over; it is replicated over the rest."""
    ep_size: _Size | None = None
    """Ranks that share the routed experts."""
    dcp_size: _Size | None = None
    """Ranks that share the KV cache of one sequence (decode context parallelism)."""

    def __post_init__(self) -> None:
        if not self.given:
            raise ValueError(f"plan says nothing; give {' or '.join(vars(self))}")

    @property
    def given(self) -> dict[str, int | str]:
        """The sizes that it states, by field."""
        return {name: size for name, size in vars(self).items() if size is not None}


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Rule:
    """One rule."""

    match: Match
    """Which layers."""
    plan: RulePlan
    """How they are split."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Policy:
    """Rules, and names for sizes."""

    axes: dict[str, _Count] = Field(default_factory=dict)
    """Name -> size, for instance `attn_tp = 2`. dp, tp and ep are known without it."""
    rules: tuple[Rule, ...] = ()
    """`match` (kind, attention_flavor, prefix_pattern) and `plan` (tp_size, ep_size, dcp_size); the first that matches
    a layer decides."""

    def __post_init__(self) -> None:
        known = sorted({*self.axes, *Sizes().degrees})
        for at, rule in enumerate(self.rules):
            for field, size in rule.plan.given.items():
                if isinstance(size, str) and size not in known:
                    raise ValueError(
                        f"rules.{at} ({rule.match}): {field}={size!r} is no axis; allowed: a number, {', '.join(known)}"
                    )
            for before, earlier in enumerate(self.rules[:at]):
                if earlier.match.covers(rule.match):
                    raise ValueError(
                        f"rules.{at} ({rule.match}) is never reached: rules.{before} ({earlier.match}) matches all "
                        "that it matches; put it first, or remove it"
                    )

    def __bool__(self) -> bool:
        return bool(self.rules)

    def to_dict(self) -> dict[str, Any]:
        """Plain tables, without what is not given."""
        rules = [
            {
                "match": {name: value for name, value in vars(rule.match).items() if value is not None},
                "plan": rule.plan.given,
            }
            for rule in self.rules
        ]
        return {"axes": dict(self.axes), "rules": rules}


NO_POLICY = Policy()
"""Every layer as the model's own sizes say."""


def attention_width(width: int) -> Policy:
    """The short form: all attention cut over `width` ranks."""
    rule = Rule(match=Match(kind="attention"), plan=RulePlan(tp_size="attn_tp"))
    return Policy(axes={"attn_tp": width}, rules=(rule,))
