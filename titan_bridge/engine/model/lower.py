"""Turns TorchTitan's declared activation shardings into vLLM collectives, once, when the model is built.

`Module.parallelize` wraps every `forward` with a general redistribution that looks each boundary up at run
time. Here each boundary is resolved beforehand: most need nothing and get their own `forward` back, the others
keep exactly one collective on the tp axis of their module, from vLLM (shared memory on one CPU node, custom all-reduce
on GPUs, but NCCL for layers that are narrower than tp: see `groups`). The source of truth stays TorchTitan's
`ShardingConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import spmd_types as spmd
import torch
from torch import nn
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import SpmdLayout
from vllm.distributed.parallel_state import GroupCoordinator

from titan_bridge.engine.model.groups import group_of
from titan_bridge.mesh import Sizes

Move = Callable[[torch.Tensor], torch.Tensor]
_WHOLE = (spmd.R, spmd.I)
"""Types with which every rank of an axis holds the whole value; they differ in the backward pass only."""


def lower(root: nn.Module, sizes: Sizes, *, merges: Callable[[str], bool] = lambda fqn: True) -> None:
    """Replace the run-time redistribution of every TorchTitan module of `root` by its one collective.

    `sizes` are those of the model, which say how wide each module is. A module that `merges` denies, by its FQN, keeps
    its partial sums, which somebody else adds up.
    """
    for width in sorted({width for _, width in sizes.widths}):
        group_of(sizes.narrowed(width))  # made by all ranks together, whichever layers they have
    for fqn, module in root.named_modules():
        if isinstance(module, Module) and "forward" in module.__dict__:
            _lower_one(module, group_of(sizes.at(fqn)), merges=merges(fqn))


def strip(root: nn.Module) -> None:
    """Give every module below `root` its plain `forward` back: all of it runs on what the rank holds."""
    for module in root.modules():
        module.__dict__.pop("forward", None)


def _lower_one(module: Module, group: GroupCoordinator, *, merges: bool) -> None:
    config = module._sharding_config
    assert config is not None
    del module.__dict__["forward"]
    forward = module.forward
    sources, targets = config.in_src_shardings or {}, config.in_dst_shardings or {}
    moves = {
        name: move
        for name, target in targets.items()
        if (move := _move(module, name, sources.get(name), target, group)) is not None
    }
    out = config.out_src_shardings
    out_move = (
        None
        if isinstance(out, tuple) or (not merges and out is not None and _on_tp(out) == spmd.P)
        else _move(module, "output", out, config.out_dst_shardings, group)
    )
    if not moves and out_move is None:
        return
    names = module._cache_pos_arg_names()

    def lowered(*args: Any, **kwargs: Any) -> Any:
        if moves:
            args = tuple(moves[n](a) if n in moves else a for n, a in zip(names, args, strict=False))
            kwargs = {n: moves[n](a) if n in moves else a for n, a in kwargs.items()}
        result = forward(*args, **kwargs)
        return result if out_move is None else out_move(result)

    module.forward = lowered  # type: ignore[method-assign]


def _move(
    module: Module, name: str, source: SpmdLayout | None, target: SpmdLayout | None, group: GroupCoordinator
) -> Move | None:
    """The collective over `group` that takes `source` to `target` on the tp axis; None where there is nothing to do."""
    if source is None or target is None or group.world_size == 1:
        return None
    have, want = (_on_tp(layout) for layout in (source, target))
    if have == want or (have in _WHOLE and want in _WHOLE):
        return None
    if have == spmd.P and want in _WHOLE:
        # vLLM's tensors have two dims; with TorchTitan's three a compiled step makes a view of each product for it.
        return lambda x: group.all_reduce(x.flatten(end_dim=-2)).view(x.shape)
    if isinstance(have, spmd.Shard) and want in _WHOLE:
        dim = have.dim
        return lambda x: group.all_gather(x, dim)
    if have in _WHOLE and isinstance(want, spmd.Shard):
        dim, rank, count = want.dim, group.rank_in_group, group.world_size
        return lambda x: x.chunk(count, dim)[rank]
    raise NotImplementedError(
        f"{type(module).__name__}.{name}: its sharding config goes from {have} to {want} on the tp axis, "
        "which serving does not know; allowed: P to R or I, S(dim) to R or I, R or I to S(dim)"
    )


def _on_tp(layout: SpmdLayout) -> Any:
    return {axis.value: kind for axis, kind in layout.per_axis_spmd_types().items()}.get("tp", spmd.R)
