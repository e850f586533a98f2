"""Which parameter is sharded how: one declarative file a family (imported as ``titan_bridge.parallelize``).

A family's file defines

- ``set_sharding(config, *, enable_ep)``: fills ``sharding_config`` on TorchTitan's config tree;
- ``shard_placement_fn(fqn, shape, sizes)``: mesh of a parameter, and the dim that its FSDP axis shards.

The file has the name of the family in ``titan_bridge/models/``; nothing else lists it. A family of
another package brings the two functions as ``Family.sharding``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from titan_bridge.device_meshes import to_parallel_dims
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import ShardPlacement, Sizes

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims
    from torchtitan.models.common.decoder import Decoder


def routed_experts_placement(fqn: str, shape: Sequence[int], sizes: Sizes) -> ShardPlacement:
    """Routed experts (global ``shape``, experts first) go to the sparse mesh where ep > 1; all else is dense.

    FSDP shards dim 0, but dim 1 of experts that are fewer than the ranks to shard them over, as in
    ``torchtitan/distributed/fsdp.py`` (which counts replicas in when ep is 1).
    """
    if ".routed_experts.inner_experts." not in fqn:
        return ShardPlacement(mesh="dense")
    if sizes.ep > 1:
        return ShardPlacement(mesh="sparse", dim=1 if sizes.efsdp * sizes.ep > shape[0] else 0)
    return ShardPlacement(mesh="dense", dim=1 if sizes.dp_replicate * sizes.fsdp > shape[0] else 0)


class ShardingRules(Protocol):
    """What a family's file here offers."""

    def set_sharding(self, config: Decoder.Config, *, enable_ep: bool) -> None: ...

    def shard_placement_fn(self, fqn: str, shape: Sequence[int], sizes: Sizes) -> ShardPlacement: ...


def rules_of(name: str) -> ShardingRules:
    """The file of the family called ``name``.

    Raises:
        BridgeError: There is no file of that name here.
    """
    module = f"{__name__}.{name}"
    try:
        return cast(ShardingRules, importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise BridgeError(f"family {name!r} has no file parallelize/{name}.py; add one") from None


def parallelize(
    model: Decoder, sizes: Sizes, spmd_backend: Literal["partial_dtensor", "full_dtensor", "spmd_types"]
) -> None:
    """TorchTitan's ``Module.parallelize`` in place; a narrow layer sees only the ranks that it is cut over.

    ``model`` may lack modules, as a pipeline stage does.
    """
    narrow: dict[int, ParallelDims] = {}
    modules: dict[str, Any] = dict(model.named_modules())
    layers: list[Any] = []
    for fqn, width in sizes.widths:
        if width not in narrow:
            narrow[width] = to_parallel_dims(sizes.at(fqn), spmd_backend)
            # Builds the meshes: all ranks together, whichever layers they have.
            narrow[width].get_optional_mesh("tp")
        if (layer := modules.get(fqn)) is None:
            continue
        layers.append(layer)
        # Hides the method of the class, which TorchTitan's walk through the model calls with the dims of the whole.
        layer.parallelize = lambda _, layer=layer, dims=narrow[width]: type(layer).parallelize(layer, dims)
    model.parallelize(to_parallel_dims(sizes, spmd_backend))
    for layer in layers:
        del layer.parallelize
