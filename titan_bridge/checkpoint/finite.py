"""Weights that are NaN or infinite: counted while they are copied, and told in one line."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from titan_bridge.sharding.moves import Copy


def count_not_finite(values: torch.Tensor) -> tuple[int, int]:
    """NaN and infinite elements of `values`, any dtype; contiguous tensors are quick."""
    if not values.dtype.is_floating_point or not values.numel():
        return 0, 0
    looked = values.to(torch.float32) if values.dtype.itemsize == 1 else values
    # The extremes are NaN if anything is, and finding them is six times as fast as isnan.
    if torch.stack(torch.aminmax(looked)).isfinite().all():
        return 0, 0
    return int(looked.isnan().sum()), int(looked.isinf().sum())


class NotFinite:
    """Looks at each live tensor once, when the last of its copies was made. Usable from several threads."""

    def __init__(self, live: Mapping[str, torch.Tensor], copies: Iterable[Copy]) -> None:
        """`live`: tensors by the copies' destination names, as they are when they are looked at."""
        self._live = live
        self._left = Counter(copy.destination_name for copy in copies)
        self._lock = threading.Lock()
        self.nan: dict[str, int] = {}
        """NaN elements by name, of tensors that have any."""
        self.inf: dict[str, int] = {}
        """Infinite elements by name, of tensors that have any."""

    def copied(self, copy: Copy) -> None:
        """One copy was made."""
        name = copy.destination_name
        with self._lock:
            self._left[name] -= 1
            if self._left[name]:
                return
        for found, count in zip((self.nan, self.inf), count_not_finite(self._live[name]), strict=True):
            if count:
                found[name] = count


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
