"""Memory for live weights on the CPU: in huge pages where Linux has them.

The first touch of a gigabyte in pages of 4 KiB is 260,000 faults, which take as long as reading the weights.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

_HUGE = 2 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def zeros_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Contiguous zeros of `tensor`'s shape and dtype (it may be on meta)."""
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if made.device.type == "cpu" and advice is not None:
        page = mmap.PAGESIZE
        first = -(-made.data_ptr() // page) * page
        length = (made.data_ptr() + made.nbytes) // page * page - first
        if length >= _HUGE:
            # Before the first touch. It is advice: a kernel without huge pages refuses, and nothing is lost.
            _libc.madvise(first, length, advice)
    return made.zero_()
