"""Rotary position settings: transformers' two spellings <-> TorchTitan's ``RoPE.Config`` fields.

transformers 5 writes ``rope_parameters: {rope_type, rope_theta, ...}``; older files write ``rope_theta``
beside ``rope_scaling: {type or rope_type, ...}``. Both are read; the newer one is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class RopeSettings:
    """What a config says about rotary positions.

    Attributes:
        theta: Base of the frequencies.
        llama3: TorchTitan's fields for Llama 3's frequency scaling, or ``None`` without scaling.
    """

    theta: float
    llama3: Mapping[str, float] | None = None

    def config(self, kind: type[RoPE.Config], *, head_dim: int, max_seq_len: int) -> RoPE.Config:
        """TorchTitan's config of class ``kind`` for a cache of ``max_seq_len`` positions."""
        scaling = {} if self.llama3 is None else {"scaling": "llama", **self.llama3}
        return kind(dim=head_dim, max_seq_len=max_seq_len, theta=self.theta, **scaling)


def read(fields: Fields, *, rope_types: Collection[str]) -> RopeSettings:
    """Rope settings of a Hugging Face config, in either spelling.

    Raises:
        UnsupportedModelError: A rope type that is not in ``rope_types``, a factor that is missing or divides by
            zero, or rotation of a part of the head only.
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
    theta = inner.number("rope_theta", default=10000.0)
    if rope_type == "default":
        return RopeSettings(theta=theta)
    if inner.hf.get("original_max_position_embeddings") is None:
        # transformers falls back to the context length, too.
        merged["original_max_position_embeddings"] = fields.integer("max_position_embeddings")
    llama3: dict[str, float] = {titan: inner.number(name) for name, titan in _LLAMA3_FIELDS.items()}
    low = llama3["low_freq_factor"]
    if llama3["high_freq_factor"] <= low:  # their difference divides
        raise inner.refusal(
            "high_freq_factor", llama3["high_freq_factor"], f"more than low_freq_factor={low}"
        )
    llama3["original_max_position_embeddings"] = inner.integer("original_max_position_embeddings")
    return RopeSettings(theta=theta, llama3=llama3)


def to_hf(rope: RoPE.Config) -> dict[str, Any]:
    """``rope_parameters`` of a TorchTitan config (the newer spelling).

    Raises:
        UnsupportedModelError: Scaling that the families here do not write (yarn).
    """
    if rope.scaling == "none":
        return {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling != "llama":
        raise Fields({}, type(rope).__qualname__).refusal("scaling", rope.scaling, "none, llama")
    scaling = {name: getattr(rope, titan) for name, titan in _LLAMA3_FIELDS.items()}
    return {"rope_type": "llama3", "rope_theta": rope.theta, **scaling}
