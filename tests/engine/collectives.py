"""The process groups of a worker, and the collectives of its steps; `watch` and `seen` are for `collective_rpc`."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SPACES = ("c10d", "_c10d_functional")


class Collectives(TorchDispatchMode):
    """Counts collectives by kind and by vLLM's name of the group, such as "allreduce tp", while it is entered.

    Both torch's and those through shared memory, which vLLM's CPU build has for a tp group.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func.name().split(".")[0].split("::")
        shared = space == "_C" and name.startswith("shm_")
        if (space in SPACES and name != "wait_tensor") or shared:
            kind = re.sub("shm|base|_", "", name)
            self.counted[f"{kind} {_group(args, shared=shared)}"] += 1
        return func(*args, **(kwargs or {}))


def _group(args: tuple[Any, ...], *, shared: bool) -> str:
    """vLLM's name of the group that a collective runs over; torch's where the group is not one of vLLM's."""
    known = {}
    for coordinator in _coordinators():
        name = coordinator.unique_name.partition(":")[0]
        known[coordinator.device_group.group_name] = known[coordinator.cpu_group.group_name] = name
        memory = getattr(coordinator.device_communicator, "dist_module", None)
        known[getattr(memory, "handle", None)] = name  # None, where a group has no shared memory
    if shared:
        return known[args[0]]
    group = next(each for each in args if isinstance(each, str | torch.ScriptObject))  # before a ReduceOp
    name = group if isinstance(group, str) else dist.ProcessGroup.unbox(group).group_name
    return known.get(name, f"of torch's, {name}")


def _coordinators() -> list[Any]:
    from vllm.distributed import parallel_state

    return [group for ref in parallel_state._groups.values() if (group := ref()) is not None]


def groups(worker: Any = None) -> list[tuple[str, list[int]]]:
    """Description and ranks of the process groups of this process, in order of their making."""
    return [
        (group.group_desc, sorted(ranks))
        for group, ranks in dist.distributed_c10d._world.pg_group_ranks.items()
        if isinstance(group, dist.ProcessGroup)  # not the mark of groups of others
    ]


def watch(worker: Any) -> None:
    """On a worker: count the collectives of each step until `seen`."""
    runner = worker.model_runner
    runner.collectives = []

    def watched(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with Collectives() as collectives:
                result = method(*args, **kwargs)
            runner.collectives.append(dict(collectives.counted))
            return result

        return call

    runner.execute_model, runner.sample_tokens = map(watched, (runner.execute_model, runner.sample_tokens))


def seen(worker: Any) -> tuple[list[dict[str, int]], int]:
    """On a worker: the collectives of each call of its runner since `watch` that had some; how many groups vLLM has."""
    runner = worker.model_runner
    del runner.execute_model, runner.sample_tokens
    return [each for each in runner.collectives if each], len(_coordinators())


def fail_resets(worker: Any, times: int) -> None:
    """Let the next `times` resets of this worker's caches fail."""
    runner, usual, left = worker.model_runner, worker.model_runner.reset_encoder_cache, iter(range(times))

    def reset() -> None:
        if next(left, None) is not None:
            raise RuntimeError("made to fail")
        usual()

    runner.reset_encoder_cache = reset
