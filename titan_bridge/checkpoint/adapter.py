"""LoRA adapters as files: out of a checkpoint that TorchTitan wrote into PEFT's folder, and back into a DCP.

They are small, so that they are read whole. The target is written beside its place and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from titan_bridge.checkpoint.model_dir import weights_directory
from titan_bridge.checkpoint.open import open_checkpoint
from titan_bridge.errors import BridgeError
from titan_bridge.json_file import read_json_object
from titan_bridge.models import family_for
from titan_bridge.models.peft import adapter_names, from_peft, to_peft

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether PEFT's files lie there."""
    return (folder / CONFIG).is_file()


def write_peft(source: Path, target: Path, *, hf: Mapping[str, Any], alpha: float) -> int:
    """Write the adapter in a checkpoint by TorchTitan's names as a PEFT folder; how many tensors.

    Args:
        source: A DCP, or a training run.
        target: Is made.
        hf: config.json of the model.
        alpha: The converter's; the product is scaled by it over the rank.

    Raises:
        BridgeError: No adapter in the checkpoint, or one that does not fit the model.
    """
    with open_checkpoint(weights_directory(str(source)) or source) as checkpoint:
        found = {name: checkpoint.read(name) for name in adapter_names(checkpoint.tensors)}
    if not found:
        raise BridgeError(f"{source} has no LoRA adapter: no tensor is called NAME.lora_a.weight")
    tensors = to_peft(found, family_for(hf).views(hf))
    (rank,) = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "bias": "none",
    }
    with _beside(target) as made:
        (made / CONFIG).write_text(json.dumps(config, indent=2))
        save_file(tensors, made / TENSORS, metadata={"format": "pt"})
    return len(tensors)


def write_dcp(source: Path, target: Path, *, hf: Mapping[str, Any]) -> int:
    """Write a PEFT folder's adapter as a DCP by TorchTitan's names; how many tensors. Arguments as above.

    Raises:
        BridgeError: Not a plain LoRA, or one that TorchTitan's cannot be.
    """
    config = read_json_object(source / CONFIG)
    for key, allowed in (("use_dora", False), ("use_rslora", False), ("bias", "none"), ("rank_pattern", {})):
        if config.get(key, allowed) not in (allowed, None):
            raise BridgeError(
                f"{source / CONFIG}: {key}={config[key]!r} is not supported; allowed: {allowed!r}"
            )
    if not (source / TENSORS).is_file():
        raise BridgeError(f"{source} has no {TENSORS}")
    tensors = from_peft(load_file(source / TENSORS), family_for(hf).views(hf))
    with _beside(target) as made:
        dcp.save(dict(tensors), checkpoint_id=made, no_dist=True)
    return len(tensors)


class _beside:
    """A hidden folder that takes the target's place in the end, and goes where something fails."""

    def __init__(self, target: Path) -> None:
        self._target = Path(os.path.abspath(target))
        if self._target.exists():
            raise BridgeError(f"{target} exists; give another directory for DST")

    def __enter__(self) -> Path:
        self._made = self._target.parent / f".{self._target.name}.partial"
        shutil.rmtree(self._made, ignore_errors=True)
        self._made.mkdir(parents=True)
        return self._made

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self._made.rename(self._target)
        else:
            shutil.rmtree(self._made, ignore_errors=True)
