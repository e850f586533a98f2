"""Which widths of an attention head vLLM's CPU kernels compute, asked of the kernels themselves.

`CPUAttentionBackend.get_supported_head_sizes` is not asked: it leaves out 48, which the kernels compute.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from vllm.platforms import current_platform

from titan_bridge.errors import BridgeError
from titan_bridge.models import family_for
from titan_bridge.models.adapters import inner_attention, latent_attention

_KERNELS = ("vec", "vec16", "amx", "neon", "rvv", "vxe", "vsx")
"""vLLM's names of the instruction sets; which of them a wheel has depends on the machine that it is for."""


_LATENT = (512, 64)
"""Widths of a latent and of the rotated part of a key that vLLM's kernels for latent attention are compiled for."""


def latent_backend(dtype: torch.dtype) -> str | None:
    """The backend for latent attention on CPUs, or None for vLLM's choice, which on AMX computes bfloat16 only."""
    return None if dtype == torch.bfloat16 else "CPU_MLA"


def check_head_dim(hf_config: Mapping[str, Any], *, latent: bool = False) -> None:
    """Refuse a model whose attention has widths that this machine's CPU kernels lack; GPUs are not asked.

    `latent`: attention caches latents.

    Raises:
        BridgeError: the width, and those that there are.
    """
    if not current_platform.is_cpu():
        return
    config = family_for(hf_config).model_config(hf_config)
    for layer in config.layers:
        known = latent_attention(layer.attention)
        if latent and known is not None:
            widths = known.kv_lora_rank, known.qk_rope_head_dim
            if widths != _LATENT:
                raise BridgeError(
                    "kv_lora_rank={} and qk_rope_head_dim={} have no kernel in vLLM's latent attention on CPUs; "
                    "allowed: {} and {}, or additional_config.titan.mla = 'expanded'".format(
                        *widths, *_LATENT
                    )
                )
            continue
        width = inner_attention(layer.attention).qk_head_dim
        if not _computes(width):
            allowed = ", ".join(str(n) for n in range(8, 1025, 8) if _computes(n))
            raise BridgeError(
                f"head_dim={width} has no kernel in vLLM's attention on CPUs; allowed: {allowed}"
            )


@functools.cache
def _computes(head_dim: int) -> bool:
    current_platform.import_kernels()
    lengths, starts = torch.ones(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    for kernel in _KERNELS:
        try:  # plans one token of one request; touches no cache
            torch.ops._C.get_scheduler_metadata(
                1, 1, 1, head_dim, lengths, torch.float32, starts, True, -1, kernel, True, None, "auto"
            )
        except RuntimeError as error:
            if "Unsupported CPU attention configuration" not in str(error):
                raise
        else:
            return True
    return False
