"""Ten thousand damaged headers: an error of ours each time, never a crash or a wrong tensor."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from tests.unit.checkpoint_samples import contents
from titan_bridge.errors import BridgeError


def corrupted(data: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, removed, added, repeated or cut off."""
    result = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        at = generator.randrange(len(result))
        how = generator.randrange(6)
        if how == 0:
            result[at] = generator.randrange(256)
        elif how == 1:
            result[at] ^= 1 << generator.randrange(8)
        elif how == 2:
            del result[at : at + generator.randrange(1, 9)]
        elif how == 3:
            result[at:at] = bytes(generator.randrange(256) for _ in range(generator.randrange(1, 9)))
        elif how == 4:
            other = generator.randrange(len(result))
            length = generator.randrange(1, 17)
            result[at : at + length] = result[other : other + length]
        else:
            del result[max(1, at) :]
        if not result:
            result = bytearray(b"\0")
    return bytes(result)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """The same three tensors in three files' worth of headers."""
    base = tmp_path_factory.mktemp("tiny")
    state = {
        "layers.0.a": torch.arange(12.0).reshape(3, 4),
        "layers.1.b": torch.ones(5),
        "layers.2.c": torch.zeros(2, 2),
    }
    dcp.save({**state, "train_state": {"step": 3}}, checkpoint_id=base / "dcp", no_dist=True)
    (base / "hf").mkdir()
    save_file(state, base / "hf/model.safetensors", metadata={"format": "pt"})
    (base / "sharded").mkdir()
    save_file(state, base / "sharded/model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(state, "model-00001-of-00001.safetensors")
    (base / "sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return {name: base / name for name in ("dcp", "hf", "sharded")}


@pytest.mark.parametrize(
    ("kind", "file", "rounds"),
    [
        ("dcp", ".metadata", 3500),
        ("dcp", "__0_0.distcp", 2500),
        ("hf", "model.safetensors", 2500),
        ("sharded", "model.safetensors.index.json", 1500),
    ],
)
@pytest.mark.timeout(600)
def test_ten_thousand_corruptions(tiny, tmp_path, kind, file, rounds):
    """An error of ours each time, or tensors of the shapes and dtypes that were there, with the right values.

    A change of the weights' own bytes, or of a name, is no damage that a header could show: such a tensor is looked
    at only for its shape. That names are those of the model is checked when a checkpoint is resharded.
    """
    right = contents(tiny[kind])
    work = tmp_path / "work"
    shutil.copytree(tiny[kind], work)
    data = (work / file).read_bytes()
    generator = random.Random(f"{kind}{file}")
    refused = 0
    for number in range(rounds):
        bad = corrupted(data, generator)
        (work / file).write_bytes(bad)
        try:
            found = contents(work)
        except BridgeError:
            refused += 1
            continue
        for name, tensor in found.items():
            if name in right and file in (".metadata", "model.safetensors.index.json"):
                assert torch.equal(tensor, right[name]), (number, name)
            elif name in right:
                assert tensor.numel() == right[name].numel(), (number, name)
    assert refused > rounds // 4
