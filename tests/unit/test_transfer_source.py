"""The tensors of a TorchTitan model under each of the names that a trainer may give them, into an engine's at tp=2.

Oracle: TorchTitan's own fused model with the same weights (its state dict has wq, wk and wv).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.qwen3 import model_registry

from titan_bridge.checkpoint.mapping import separate_qkv_views
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes
from titan_bridge.model_layout import layout
from titan_bridge.models import family_of
from titan_bridge.models.build import build_on_meta, materialize
from titan_bridge.sharding.plan import plan
from titan_bridge.testing_samples import local_part, same_bits, sample
from titan_bridge.transfer.source import TensorSource


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Decoder) -> Decoder:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def empty(flavor: str) -> Decoder:
    return materialize(build_on_meta(model_registry(flavor).model, dtype=torch.float32), "cpu")


def fused() -> Decoder:
    model = empty("debugmodel")
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(sample(name, tuple(param.shape), 1))
    return model


def separate() -> Decoder:
    model = empty("debugmodel_non_fused_qkv")
    model.load_state_dict(fused().state_dict())
    return sharded(model)


def saved() -> object:
    return sharded(fused()).state_dict


def wrapped() -> dict[str, torch.Tensor]:
    model = fused()
    for name, layer in list(model.layers.items()):
        model.layers[name] = checkpoint_wrapper(layer)
    named = dict(sharded(model).named_parameters())
    assert any("_checkpoint_wrapped_module." in name for name in named)
    return named


def compiled() -> dict[str, torch.Tensor]:
    return dict(torch.compile(sharded(fused())).named_parameters())


@pytest.mark.parametrize("given", [fused, separate, saved, wrapped, compiled])
def test_every_name_of_a_weight_reaches_the_engines(given) -> None:
    config = model_registry("debugmodel").model
    family = family_of(config)
    hf = family.hf_config(config, dtype="float32")
    engine = layout(hf, Sizes(tp=2))
    views = (*family.views(hf), *separate_qkv_views(family, hf, hf["vocab_size"]))
    source = TensorSource(given(), rank=0)
    local, made = source.local(), plan(source.layout(), engine, views)
    for rank in (0, 1):
        shapes = {name: engine.local_shape(name, rank) for name in engine.params}
        live = {name: torch.zeros(shape or ()) for name, shape in shapes.items()}
        for copy in made.copies(destination=rank):
            window = copy.destination_window.of(live[copy.destination_name])
            window.copy_(copy.source_window.of(local[copy.source_name]))
        for name, tensor in live.items():
            want = local_part(sample(name, engine.params[name].shape, 1), engine, name, rank)
            assert same_bits(tensor, want), name


def test_two_tensors_of_one_name_are_refused() -> None:
    given = {"_orig_mod.a": torch.ones(2), "a": torch.ones(2)}
    with pytest.raises(BridgeError, match="a is given a second time, without its wrapper"):
        TensorSource(given, rank=0).tensors()


def test_a_missing_tensor_is_named_with_what_was_given() -> None:
    engine = layout(family_of(config := model_registry("debugmodel").model).hf_config(config), Sizes())
    with pytest.raises(
        BridgeError,
        match=r"tok_embeddings.weight is in no source.*the source has net\.0, net\.1, net\.2 and 1",
    ):
        plan(TensorSource({f"net.{i}": torch.ones(2) for i in range(4)}, rank=0).layout(), engine)


def test_a_filter_and_new_names() -> None:
    given = {"model.a": torch.ones(2), "model.value_head": torch.ones(2), "model.b": torch.ones(2)}
    source = TensorSource(
        given, rank=0, filter=lambda n: "value_head" not in n, rename=lambda n: n.removeprefix("model.")
    )
    assert list(source.tensors()) == list(source.layout().params) == ["a", "b"]
    clash = TensorSource(given, rank=0, rename=lambda name: "a")
    with pytest.raises(BridgeError, match=r"model\.value_head is given a second time"):
        clash.tensors()
