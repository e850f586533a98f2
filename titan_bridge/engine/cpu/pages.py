"""Memory for live weights: zeros that cost nothing until weights are read into them."""

from __future__ import annotations

import contextlib
import mmap

import torch

_SMALL = 1 << 16  # bytes: not worth pages of its own


def zeros(count: int, device: torch.device) -> torch.Tensor:
    """`count` bytes of zeros.

    On the CPU they are pages that the kernel hands out zeroed at the first touch, huge ones where it can: `torch.zeros`
    would touch all of them now, and loading once more; an allocator may have used pages, and would clear them. Freed,
    they go back to the kernel at once, whichever thread has made them (see `titan_bridge.cpu.keep_freed_memory`).
    """
    if device.type != "cpu" or count < _SMALL:
        return torch.zeros(count, dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def zeros_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Contiguous zeros of `tensor`'s shape and dtype (it may be on meta); see `zeros`."""
    return zeros(tensor.nbytes, device).view(tensor.dtype).view(tensor.shape)
