"""What two nodes compare before they serve one model: equal for copies, different for other weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from titan_bridge.checkpoint import open_checkpoint
from titan_bridge.checkpoint.reshard import Options, prepare
from titan_bridge.checkpoint.verify import digest
from titan_bridge.testing import make_checkpoint


def of(folder: Path) -> str:
    with open_checkpoint(folder) as checkpoint:
        found = digest(checkpoint)
        assert checkpoint.bytes_read == 0
    return found


@pytest.mark.parametrize("form", ["hf", "dcp"])
def test_copies_are_alike_and_other_weights_are_not(form: str, tmp_path: Path) -> None:
    digests = []
    for seed in (0, 1):
        model = make_checkpoint(tmp_path / f"model{seed}", "llama3", seed=seed, tokenizer=False)
        folder = tmp_path / f"{form}{seed}"
        prepare(Options(source=model, target=folder, to=form)).run()
        digests.append(of(folder))
        shutil.copytree(folder, tmp_path / "elsewhere" / str(seed))
        assert of(tmp_path / "elsewhere" / str(seed)) == digests[-1]
    assert digests[0] != digests[1]


def test_two_steps_of_a_run_and_one_layer_tuned_are_different(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {f"layers.{i}.weight": torch.randn(64, 64) for i in range(8)}
    for step in (1, 2):
        dcp.save(
            {name: w * step for name, w in weights.items()}, checkpoint_id=str(tmp_path / f"step-{step}")
        )
    assert of(tmp_path / "step-1") != of(tmp_path / "step-2")
    for name, tensors in (("a", weights), ("b", weights | {"layers.3.weight": torch.randn(64, 64)})):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert of(tmp_path / "a") != of(tmp_path / "b")
