"""Weights that are NaN or infinite: counted, and told in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


def count_not_finite(values: torch.Tensor) -> tuple[int, int]:
    """NaN and infinite elements of `values`, any dtype; contiguous tensors are quick."""
    if not values.dtype.is_floating_point or not values.numel():
        return 0, 0
    looked = values.to(torch.float32) if values.dtype.itemsize == 1 else values
    # A sum is not finite if an element is not, and is made at the speed of memory. It may overflow by itself, too.
    if math.isfinite(looked.sum().item()):
        return 0, 0
    return int(looked.isnan().sum()), int(looked.isinf().sum())


def not_finite_lines(nan: Mapping[str, int], inf: Mapping[str, int]) -> list[str]:
    """One line for NaN and one for infinity, where there are any; the arguments count elements by tensor name."""
    lines = []
    for what, counts in (("NaN", nan), ("infinite", inf)):
        if counts:
            worst = sorted(counts, key=lambda name: -counts[name])[:3]
            named = ", ".join(f"{name} ({counts[name]:,})" for name in worst)
            more = f" and {len(counts) - 3} more tensors" if len(counts) > 3 else ""
            lines.append(f"{sum(counts.values()):,} weights are {what}: {named}{more}")
    return lines
