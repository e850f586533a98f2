"""Dense weights sharded over dp while serving: `fully_shard` around what is already this rank's tp shard.

Each group keeps `1/dp` of its weights and gathers them when its forward begins, the next group's gather running
ahead. Nothing is gathered outside the model's forward, because dp ranks only step in lockstep there: an idle
rank runs the forward on a dummy batch but never asks for logits, and a busy one may ask twice (prompt
log-probabilities). So the head is gathered at the end of the forward and dropped at the start of the next.
"""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torchtitan.models.common.decoder import Decoder

from titan_bridge.mesh import DENSE, SPARSE, mesh_axes, shard_axis
from titan_bridge.sharding.boxes import shard_dim
from titan_bridge.sharding.layout import Layout


def shard_dense(model: Decoder, meshes: dict[str, DeviceMesh], layout: Layout) -> Decoder:
    """Shard the weights of `model` (plain local tp or ep shards on the device) over the fsdp and efsdp axes, in place,
    along the dims that `layout` says.

    Experts whose efsdp axis has size 1 are left alone: a gather over one rank saves nothing and its in-place
    bookkeeping fails inside `torch.inference_mode()`.
    """
    dense = meshes[DENSE]["dp_replicate", "fsdp"]
    dims: dict[nn.Parameter, Shard] = {}
    skip: set[nn.Parameter] = set()
    sparse: set[nn.Parameter] = set()
    for fqn, param in model.named_parameters():
        spec = layout.param(fqn).spec
        dim = shard_dim(spec.placements[mesh_axes(spec.mesh).index(shard_axis(spec.mesh))])
        if dim is None:
            skip.add(param)
        else:
            dims[param] = Shard(dim)
        if spec.mesh == SPARSE:
            sparse.add(param)
    groups: list[nn.Module] = [model.tok_embeddings]
    for layer in model.layers.values():
        if getattr(layer, "moe", None) is not None:
            experts = layer.moe.routed_experts.inner_experts
            if set(experts.parameters()) <= sparse - skip:
                fully_shard(
                    experts,
                    mesh=meshes[SPARSE]["dp_replicate", "efsdp"],
                    shard_placement_fn=dims.__getitem__,
                    reshard_after_forward=True,
                )
        groups.append(layer)
    if model.enable_weight_tying:
        model.lm_head = None  # `head` multiplies by the embedding; one parameter cannot be in two groups
    else:
        groups.append(model.lm_head)
    for group in groups:
        fully_shard(
            group,
            mesh=dense,
            shard_placement_fn=dims.__getitem__,
            ignored_params=skip & set(group.parameters()),
            reshard_after_forward=group is not model.lm_head,
        )
    # The root holds what is left, the last norm; it also starts every gather of a step.
    fully_shard(
        model,
        mesh=dense,
        shard_placement_fn=dims.__getitem__,
        ignored_params=skip,
        reshard_after_forward=False,
    )
    steps = [cast(FSDPModule, group) for group in groups if group is not model.lm_head]
    for this, following in itertools.pairwise(steps):
        this.set_modules_to_forward_prefetch([following])
    return model


def drop_head(model: Decoder) -> None:
    """Drop the gathered head; every dp rank starts its forward with this, so that all gather it again."""
    _head_owner(model).reshard()


def gather_head(model: Decoder) -> None:
    """Gather what `head` needs; every dp rank ends its forward with this."""
    _head_owner(model).unshard()


def drop_gathered(model: Decoder) -> None:
    """Drop whatever is gathered (the last norm stays so between steps), so that the next step gathers new weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _head_owner(model: Decoder) -> FSDPModule:
    return cast(FSDPModule, model.tok_embeddings if model.enable_weight_tying else model.lm_head)


def head(model: Decoder, hidden_TD: torch.Tensor) -> torch.Tensor:
    """Logits of this rank's part of the vocabulary, from the gathered head."""
    if not model.enable_weight_tying:
        return model.lm_head(hidden_TD)
    return nn.functional.linear(hidden_TD, cast(torch.Tensor, model.tok_embeddings.weight))
