"""The processes of one run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from titan_bridge.errors import BridgeError

T = TypeVar("T")
_PATIENCE = timedelta(days=30)
"""For the slowest process: a share can take hours, and whoever is done waits. torchrun ends all when one dies."""


class Team:
    """Rank and size, and the one exchange that a run needs. Everything is on gloo; no GPU is touched."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self._joined = False

    def join(self) -> None:
        """Meet the others. Does nothing for one process, or in a process group that exists."""
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
            self._joined = True

    def leave(self) -> None:
        """End the process group that `join` made."""
        if self._joined:
            dist.destroy_process_group()
            self._joined = False

    def each(self, step: Callable[[], T]) -> list[T]:
        """Run `step` on every process and return what all of them returned, in order of rank, on all of them.
        Raises BridgeError: what any of them raised, on all of them, so that none waits for one that has given up."""
        if self.size == 1:
            return [step()]
        error, failed, value = None, None, None
        try:
            value = step()
        except Exception as caught:
            error = caught
            failed = str(caught) if isinstance(caught, BridgeError) else f"{type(caught).__name__}: {caught}"
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, (failed, value))
        if error is not None:
            raise error
        for rank, (failed, _) in enumerate(outcomes):
            if failed is not None:
                raise BridgeError(f"rank {rank} failed: {failed}")
        return [value for _, value in outcomes]

    def first(self, step: Callable[[], T]) -> T:
        """Run `step` on rank 0 only; all get what it returned, or what it raised."""
        return self.each(lambda: step() if self.rank == 0 else None)[0]  # type: ignore[return-value]
