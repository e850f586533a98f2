"""What a config.json says about quantized weights, which are read and never written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from titan_bridge.models.fields import Fields

KEY = "quantization_config"
MXFP4_GROUP = 32
"""Values that share a scale."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How weights are stored: fp8 (E4M3) in 2-D blocks with a float scale each, or mxfp4 in groups of 32 values."""

    method: Literal["fp8", "mxfp4"]
    block: tuple[int, int] = (1, MXFP4_GROUP)


def read(hf: Mapping[str, Any], architecture: str = "config.json") -> Quantization | None:
    """The quantization of a parsed config.json, or None.

    Raises:
        UnsupportedModelError: A method or form of it that is not read.
    """
    stated = hf.get(KEY)
    if stated is None:
        return None
    if not isinstance(stated, Mapping):
        raise Fields(hf, architecture).refusal(KEY, stated, "an object")
    fields = Fields(stated, f"{architecture}, {KEY}")
    if stated.get("quant_method") not in ("fp8", "mxfp4"):
        raise fields.refusal("quant_method", stated.get("quant_method"), "'fp8', 'mxfp4'")
    if stated["quant_method"] == "mxfp4":
        return Quantization(method="mxfp4")
    fields.only("fmt", ("e4m3",))
    block = fields.integers("weight_block_size")
    if len(block) != 2 or 0 in block:
        raise fields.refusal(
            "weight_block_size", stated.get("weight_block_size"), "rows and columns: [128, 128]"
        )
    return Quantization(method="fp8", block=(block[0], block[1]))
