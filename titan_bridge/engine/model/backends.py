"""Which of vLLM's attention backends can serve attention that is narrower than tp."""

from __future__ import annotations

from titan_bridge.errors import BridgeError
from titan_bridge.policy.layers import Split

HEADS_OF_LAYERS = (
    "CPU_ATTN", "CPU_MLA", "CUTLASS_MLA", "FLASHINFER", "FLASHINFER_MLA", "FLASH_ATTN", "FLASH_ATTN_MLA", "TRITON_ATTN",
    "TRITON_MLA",
)  # fmt: skip
"""Backends whose metadata builders ask the layers for their heads; others divide the model's by tp (vLLM 0.32)."""


def check_backend(name: str, split: Split) -> None:
    """Raise BridgeError if the backend `name` cannot compute the attention that `split` says."""
    for fqn, plan in split.plans.items():
        narrow = split.layers[fqn].kind == "attention" and plan.tp_size < split.sizes.tp
        if narrow and name not in HEADS_OF_LAYERS:
            raise BridgeError(
                f"attention backend {name} counts heads of the model over tp={split.sizes.tp}, but {fqn} has tp_size="
                f"{plan.tp_size}; allowed: {', '.join(HEADS_OF_LAYERS)} (attention_config.backend), or tp_size="
                f"{split.sizes.tp}"
            )
