"""Folders that torch_checkpointing wrote: here by one process, in tests/distributed/ by four with DTensors."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.checkpoint_samples import SMALL, contents, options
from titan_bridge.checkpoint import open_checkpoint
from titan_bridge.checkpoint.model_dir import has_expert_bias
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.checkpoint.torch_checkpointing import METADATA
from titan_bridge.errors import BridgeError
from titan_bridge.testing import make_checkpoint

pytest.importorskip("torch_checkpointing")

from torch_checkpointing.checkpoint_layout import LayoutInfo, SafetensorsSerialization
from torch_checkpointing.checkpoint_manager import CheckpointManager
from torch_checkpointing.config import SyncCheckpointSaverConfig
from torch_checkpointing.default_resharder import DefaultResharder
from torch_checkpointing.schema import ItemSpec
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig


def save(folder: Path, items: dict[str, Any], **spec: Any) -> Path:
    """Save items as the package does; `spec` is how."""
    manager = CheckpointManager.Config(
        items={key: ItemSpec(**spec) for key in items},
        save=SyncCheckpointSaverConfig(),
        storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
    ).build()
    manager.save(str(folder), items)
    manager.close()
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model in Hugging Face's format, and its tensors under TorchTitan's names."""
    base = tmp_path_factory.mktemp("second")
    source = make_checkpoint(base / "hf", "qwen3_moe", tokenizer=False, **SMALL | {"head_dim": 32})
    prepare(options(source, base / "dcp", to="dcp")).run()
    return source, contents(base / "dcp")


@pytest.fixture(scope="module")
def described(model, tmp_path_factory) -> Path:
    """The model saved with metadata, beside an optimizer and a counter."""
    items = {"model": model[1], "optimizer": {"state": {"w": torch.ones(3)}}, "train_state": {"step": 3}}
    return save(tmp_path_factory.mktemp("described") / "step-1", items, resharder=DefaultResharder())


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"resharder": DefaultResharder()},
        {
            "resharder": DefaultResharder(),
            "layout": LayoutInfo("rank_{rank}/w.safetensors", SafetensorsSerialization()),
        },
    ],
    ids=["without metadata", "with metadata", "safetensors"],
)
def test_a_model_is_carried_bit_for_bit(model, tmp_path, spec):
    source, tensors = model
    folder = save(tmp_path / "step-1", {"model": tensors}, **spec)
    assert (folder / METADATA).is_file() == ("resharder" in spec)
    for to in ("hf", "dcp"):
        prepare(options(folder, tmp_path / to, to=to, config=source)).run()
        expected = contents(source) if to == "hf" else tensors
        found = contents(tmp_path / to)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_other_items_are_left_out_or_named(described):
    with open_checkpoint(described) as checkpoint:
        assert not checkpoint.extra_tensors
        assert checkpoint.left_out == 1
    with open_checkpoint(described, extra=True) as checkpoint:
        assert list(checkpoint.extra_tensors) == ["optimizer.state.w"]
        assert torch.equal(checkpoint.read("optimizer.state.w"), torch.ones(3))
    with pytest.raises(BridgeError, match="--with-optimizer carries optimizer state from DCP to DCP only"):
        prepare(options(described, described.parent / "new", to="dcp", with_optimizer=True))


def test_other_names_and_the_expert_bias_are_found(model, tmp_path):
    source, tensors = model
    renamed = {f"net.{name}": tensor for name, tensor in tensors.items()}
    folder = save(tmp_path / "step-1", {"model": renamed | {"net.layers.0.moe.expert_bias_E": torch.ones(4)}})
    assert has_expert_bias(str(folder), names="net.{}")
    assert not has_expert_bias(str(source))
    with open_checkpoint(folder, names="net.{}") as checkpoint:
        assert checkpoint.tensors.keys() >= tensors.keys()


def changed(described: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy with other metadata."""
    shutil.copytree(described, folder)
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    return folder


def model_of(metadata: dict[str, Any], key: str) -> dict[Any, Any]:
    return metadata["metadata"]["model"][key]


def in_file(path: str, form: str) -> Callable[[dict[str, Any]], object]:
    layout = {"file_path": path, "serialization_format": {"type": form}}
    return lambda metadata: model_of(metadata, "rank_to_layout_info").update({0: layout})


def strided(metadata: dict[str, Any]) -> None:
    norm(metadata)["data"]["placements"] = [{"type": "StridedShard", "dim": 0, "split_factor": 1 << 40}]


def one_more(metadata: dict[str, Any]) -> None:
    model_of(metadata, "nested_path_to_metadata")['["a"]'] = [{"sharding_metadata": norm(metadata)}]


def norm(metadata: dict[str, Any]) -> dict[str, Any]:
    (group,) = model_of(metadata, "nested_path_to_metadata")['["norm.weight"]']
    return group["sharding_metadata"]


def two_halves(metadata: dict[str, Any]) -> None:
    """The norm is on two ranks, of which the second has saved nothing."""
    norm(metadata)["data"] |= {
        "mesh_spec": {"device_type": "cpu", "mesh_shape": (2,), "mesh_data": (0, 1), "mesh_dim_names": None},
        "placements": [{"type": "Shard", "dim": 0}],
    }


def one_file(metadata: dict[str, Any]) -> None:
    """The norm is twice as long, and both ranks have saved it in the file of the first."""
    two_halves(metadata)
    norm(metadata)["data"].update(global_shape=[64])
    layouts = model_of(metadata, "rank_to_layout_info")
    layouts |= {rank: {"file_path": "model_0.pt", "serialization_format": {}} for rank in (0, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version="9"), "version '9'; read is '2.0'"),
        (lambda m: m.update(metadata=3), "damaged metadata"),
        (lambda m: norm(m).update(type="default_tensor_v1"), "norm.weight is described as 'default_tensor_v1'"),
        (lambda m: norm(m)["data"].update(dtype="torch.float16"), "the metadata says torch.float16"),
        (lambda m: norm(m)["data"].update(dtype="os.system"), "not a torch dtype"),
        (lambda m: norm(m)["data"].update(global_shape=[9]), r"the metadata says torch.float32 \(9,\)"),
        (lambda m: norm(m)["data"].update(placements=[{"type": "Partial"}]), "norm.weight has the placement 'Partial'"),
        (lambda m: norm(m)["data"].update(placements=[]), "norm.weight has 0 placements on a mesh of 1 axes"),
        (lambda m: norm(m)["data"].update(placements=[{"type": "Shard", "dim": 1}]), "shards dim 1 of a tensor"),
        (strided, "read is one of dim 0"),
        (two_halves, r"model_0.pt: norm.weight is torch.float32 \(32,\); the metadata says"),
        (one_file, "model_0.pt is the file of ranks 0 and 1"),
        (one_more, "has no tensor a"),
        (in_file("../x.pt", "TorchSerialization"), "outside"),
        (in_file("model_0.pt", "RawSerialization"), "is of 'RawSerialization'"),
        (lambda m: model_of(m, "rank_to_layout_info").clear(), "nothing says where rank 0 saved model"),
        (lambda m: m["metadata"].pop("model"), "has no item 'model'"),
    ],
)  # fmt: skip
def test_metadata_that_does_not_fit_is_refused(described, tmp_path, change, message):
    with pytest.raises(BridgeError, match=message):
        open_checkpoint(changed(described, tmp_path / "copy", change))


class Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path.cwd() / "was_run"),)


def test_nothing_in_a_pickle_is_run(described, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(described, tmp_path / "copy")
    (tmp_path / "copy" / METADATA).write_bytes(pickle.dumps({"version": Command()}))
    with pytest.raises(BridgeError, match=r"metadata.pkl: the pickle names 'posix.mkdir'"):
        open_checkpoint(tmp_path / "copy")
    (tmp_path / "copy" / METADATA).unlink()
    torch.save({"w": torch.ones(2), "x": Command()}, tmp_path / "copy" / "model_0.pt")
    with pytest.raises(BridgeError, match=r"model_0.pt: the pickle names 'posix.mkdir'"):
        open_checkpoint(tmp_path / "copy")
    assert not (tmp_path / "was_run").exists()


def test_files_of_several_ranks_without_metadata_are_refused(model, tmp_path):
    folder = save(tmp_path / "step-1", {"model": model[1]})
    shutil.copyfile(folder / "model_0.pt", folder / "model_1.pt")
    with pytest.raises(BridgeError, match=r"model_0.pt, model_1.pt and no metadata.pkl"):
        open_checkpoint(folder)


def test_a_few_nested_dicts_do_not_stand_for_many_tensors(tmp_path):
    nested: Any = {"w": torch.ones(1)}
    for _ in range(50):
        nested = {"a": nested, "b": nested}
    (tmp_path / "c").mkdir()
    torch.save(nested, tmp_path / "c" / "model_0.pt")
    with pytest.raises(BridgeError, match="a dict in several places"):
        open_checkpoint(tmp_path / "c")


def test_damaged_bytes_are_refused_or_change_nothing_but_values(described, tmp_path):
    shutil.copytree(described, tmp_path / "copy")
    rng, refused = random.Random(0), 0
    with open_checkpoint(described) as checkpoint:
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in checkpoint.tensors.items()}
    for turn in range(200):
        file = (METADATA, "model_0.pt")[turn % 2]
        whole = (described / file).read_bytes()
        data = bytearray(whole)
        near = min(len(data), 20_000)  # the pickle is in front, the directory at the end
        data[rng.choice((rng.randrange(near), -1 - rng.randrange(near)))] ^= 1 << rng.randrange(8)
        (tmp_path / "copy" / file).write_bytes(data)
        try:
            with open_checkpoint(tmp_path / "copy") as checkpoint:
                for name in checkpoint.tensors.keys() & expected.keys():
                    found = checkpoint.read(name)
                    assert (found.shape, found.dtype) == expected[name]
        except BridgeError:
            refused += 1
        (tmp_path / "copy" / file).write_bytes(whole)
    assert refused > 50
