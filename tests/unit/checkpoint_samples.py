"""What the tests of interrupted, damaged and refused conversions share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from titan_bridge.checkpoint import open_checkpoint
from titan_bridge.checkpoint.execute import Executor
from titan_bridge.checkpoint.load import load_into
from titan_bridge.checkpoint.reshard import Options
from titan_bridge.models import family_for
from titan_bridge.sharding import Layout

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

NORM = "model.norm.weight"


def options(source: Path, target: Path, **more) -> Options:
    return Options(
        source=source, target=target, **{"to": "dcp", "max_shard_size": 40_000, "workers": 1, **more}
    )


def contents(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def of_rank(directory: Path, layout: Layout, rank: int, hf: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a rank of the engine loads of a checkpoint; elements that no file has are zero."""
    family, params = family_for(hf), layout.params
    live = {
        fqn: torch.zeros(layout.local_shape(fqn, rank), dtype=getattr(torch, params[fqn].dtype))
        for fqn in params
    }
    rows = params["tok_embeddings.weight"].shape[0]
    with open_checkpoint(directory) as checkpoint:
        loaded = load_into(
            checkpoint,
            live,
            layout,
            rank,
            family=family,
            hf=hf,
            padded_vocab=rows,
            buffers=family.expert_biases(hf),
        )
    assert loaded.bytes_read == loaded.bytes_planned
    return live


def assert_equal(one: Path, other: Path) -> None:
    a, b = contents(one), contents(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def changed(source: Path, target: Path, change) -> Path:
    state = contents(source)
    change(state)
    target.mkdir()
    save_file(state, target / "model.safetensors")
    shutil.copy(source / "config.json", target)
    return target


class Killed(BaseException):
    pass


def stop_after(monkeypatch, files: int) -> None:
    """The run dies in the middle of a file, after this many were finished."""
    real = Executor._write_strip
    finished: set[str] = set()

    def write(self, opened, strip):
        finished.add(opened.file.name)
        if len(finished) > files:
            raise Killed
        return real(self, opened, strip)

    monkeypatch.setattr(Executor, "_write_strip", write)
