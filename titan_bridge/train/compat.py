"""What TorchTitan 0.3 needs to train with the released torch, on every device.

TorchTitan is developed against torch's nightly builds; 0.3.0 uses a few things that torch 2.13 does not have yet.
What a CPU needs besides is in `cpu.py`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

PREFERRED: dict[str, Any] = {"parallelism.spmd_backend": "partial_dtensor"}
"""Fields of `Trainer.Config` whose default is another one here.

Under TorchTitan's default, spmd_types, fully_shard of torch 2.13 stops with "all parameters must be DTensors on the
full SPMD mesh". Seen with torchtitan 0.3.0 and torch 2.13.0; can go when the Trainer runs under its default.
"""

ORIGIN = "torch 2.13"


def apply() -> None:
    """Give torch the function that TorchTitan's `set_pg_timeouts` calls, where it is missing; call it again freely.

    `torch.distributed.set_timeout` is public in torch's nightly builds and private in 2.13; without it every run
    stops after its first step. Can go with torch 2.14.
    """
    if not hasattr(dist, "set_timeout"):
        vars(dist)["set_timeout"] = _set_timeout


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup | None = None) -> None:
    dist.distributed_c10d._set_pg_timeout(timeout, group)
