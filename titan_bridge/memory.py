"""The memory of tensors, for what reads and writes bytes."""

from __future__ import annotations

import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, shared. RuntimeError for one that is not contiguous."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
