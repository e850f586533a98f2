"""Rotary position settings: transformers' two spellings <-> TorchTitan's ``RoPE.Config`` fields.

transformers 5 writes ``rope_parameters: {rope_type, rope_theta, ...}``; older files write ``rope_theta``
beside ``rope_scaling: {type or rope_type, ...}``. Both are read; the newer one is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from titan_bridge.models.fields import Fields

if TYPE_CHECKING:
    from torchtitan.models.common.rope import RoPE

_LLAMA3_FIELDS = {
    "factor": "scaling_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
_YARN_FIELDS = {
    "factor": "rope_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "original_max_position_embeddings": "original_seq_len",
    "truncate": "truncate",
}


@dataclass(frozen=True, kw_only=True)
class RopeSettings:
    """What a config says about rotary positions.

    Attributes:
        theta: Base of the frequencies.
        scaling: TorchTitan's fields for scaled frequencies; empty without scaling.
        mscale: YaRN in DeepSeek: weight of log(factor) in the softmax scale.
    """

    theta: float
    scaling: Mapping[str, Any] = field(default_factory=dict)
    mscale: float = 1.0

    def config(self, kind: type[RoPE.Config], *, head_dim: int, max_seq_len: int) -> RoPE.Config:
        """TorchTitan's config of class ``kind`` for a cache of ``max_seq_len`` positions."""
        return kind(dim=head_dim, max_seq_len=max_seq_len, theta=self.theta, **self.scaling)


def read(
    fields: Fields, *, rope_types: Collection[str], default_theta: float = 10000.0, mscale: bool = False
) -> RopeSettings:
    """Rope settings of a Hugging Face config, in either spelling.

    Args:
        fields: The whole config.
        rope_types: Those that the model can compute.
        default_theta: Of transformers' config class.
        mscale: The model takes YaRN's ``mscale_all_dim`` (DeepSeek), else YaRN's own factor for attention.

    Raises:
        UnsupportedModelError: A rope type that is not in ``rope_types``, a factor that is missing or divides by zero,
            rotation of a part of the head only, or a factor for attention that TorchTitan does not apply.
    """
    hf = fields.hf
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    stated = hf.get(key) or {}
    # transformers can nest one set of settings for each layer type; TorchTitan's families here have one for all.
    if not isinstance(stated, Mapping) or any(isinstance(value, Mapping) for value in stated.values()):
        raise fields.refusal(key, stated, "one object with rope_type and rope_theta for all layers")
    outer = {name: hf.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    merged = outer | {name: value for name, value in stated.items() if value is not None}
    inner = Fields(merged, f"{fields.architecture}, {key}")
    inner.only("partial_rotary_factor", (1.0,))
    rope_type = merged.get("rope_type") or merged.get("type") or "default"
    if rope_type not in rope_types:
        raise inner.refusal("rope_type", rope_type, ", ".join(rope_types))
    theta = inner.number("rope_theta", default=default_theta)
    if rope_type == "default":
        return RopeSettings(theta=theta)
    if inner.hf.get("original_max_position_embeddings") is None:
        # transformers falls back to the context length, too.
        merged["original_max_position_embeddings"] = fields.integer("max_position_embeddings")
    original = inner.integer("original_max_position_embeddings")
    if rope_type == "yarn":
        return _yarn(inner, theta, original, mscale=mscale)
    llama3: dict[str, Any] = {titan: inner.number(name) for name, titan in _LLAMA3_FIELDS.items()}
    low = llama3["low_freq_factor"]
    if llama3["high_freq_factor"] <= low:  # their difference divides
        raise inner.refusal(
            "high_freq_factor", llama3["high_freq_factor"], f"more than low_freq_factor={low}"
        )
    llama3["original_max_position_embeddings"] = original
    return RopeSettings(theta=theta, scaling={"scaling": "llama", **llama3})


def _yarn(inner: Fields, theta: float, original: int, *, mscale: bool) -> RopeSettings:
    factor = inner.number("factor")
    if factor < 1:
        raise inner.refusal("factor", factor, "a number of at least 1")
    inner.only("attention_factor", ())
    weight = 1.0
    if mscale:
        # Where the two differ, transformers scales the rotated part of q and k only, which TorchTitan does not.
        weight = inner.number("mscale_all_dim")
        inner.only("mscale", (weight,))
        inner.number("mscale")
    else:
        inner.only("mscale", ())
        inner.only("mscale_all_dim", ())
    scaling = {
        "scaling": "yarn",
        "rope_factor": factor,
        "beta_fast": inner.number("beta_fast", default=32.0),
        "beta_slow": inner.number("beta_slow", default=1.0),
        "original_seq_len": original,
        "truncate": inner.flag("truncate", default=True),
    }
    return RopeSettings(theta=theta, scaling=scaling, mscale=weight)


def to_hf(rope: RoPE.Config) -> dict[str, Any]:
    """``rope_parameters`` of a TorchTitan config (the newer spelling)."""
    kind, names = {
        "none": ("default", {}),
        "llama": ("llama3", _LLAMA3_FIELDS),
        "yarn": ("yarn", _YARN_FIELDS),
    }[rope.scaling]
    scaling = {name: getattr(rope, titan) for name, titan in names.items()}
    return {"rope_type": kind, "rope_theta": rope.theta, **scaling}
