"""Memory for live weights: zeros that cost nothing until weights are read into them."""

from __future__ import annotations

import numpy as np
import torch

_ALIGNMENT = 64  # bytes, as torch's own allocator


def zeros_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Contiguous zeros of `tensor`'s shape and dtype (it may be on meta).

    On the CPU they are pages that the kernel hands out zeroed at the first touch: `torch.zeros` would touch all of them
    now, and loading once more. numpy also asks for huge pages.
    """
    if device.type != "cpu":
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    raw = torch.from_numpy(np.zeros(tensor.nbytes + _ALIGNMENT, dtype=np.uint8))
    first = -raw.data_ptr() % _ALIGNMENT
    return raw[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
