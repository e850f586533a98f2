"""The process groups over which layers that are cut over fewer ranks than tp add up and gather.

On GPUs these use NCCL: vLLM gives its custom all-reduce to the group named "tp" alone.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch.distributed as dist
from vllm.distributed import get_tp_group, get_world_group, init_model_parallel_group
from vllm.distributed.parallel_state import GroupCoordinator

from titan_bridge.mesh import Sizes

_MADE: WeakKeyDictionary[GroupCoordinator, dict[int, GroupCoordinator]] = WeakKeyDictionary()
"""By tp group, then by width. vLLM keeps only weak references to groups."""


def group_of(sizes: Sizes) -> GroupCoordinator:
    """The group of a module of `sizes` on its tp axis; all ranks ask for a new width at the same time."""
    whole = get_tp_group()
    if sizes.tp_replicate == 1:
        return whole
    made = _MADE.setdefault(whole, {})
    if sizes.tp not in made:
        # Ranks of a tp group are consecutive, so every run of `width` ranks of the world is one group.
        runs = [list(range(at, at + sizes.tp)) for at in range(0, dist.get_world_size(), sizes.tp)]
        world = get_world_group()
        made[sizes.tp] = init_model_parallel_group(
            runs,
            world.local_rank,
            dist.get_backend(world.device_group),
            group_name=f"tp_width{sizes.tp}",  # shared memory on CPUs is for names that begin with "tp"
        )
    return made[sizes.tp]
