"""The tensors of a Hugging Face checkpoint by name, read one at a time; for checks, not for loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from titan_bridge.engine.native.layers import Native
from titan_bridge.errors import BridgeError


class CheckpointTensors:
    """`tensors["model.norm.weight"]` reads that tensor, in the dtype of the file."""

    def __init__(self, directory: str | Path) -> None:
        """Raises BridgeError when there is no safetensors file in `directory`."""
        folder = Path(directory)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            weights = json.loads(index.read_text())["weight_map"]
            self._files = {name: folder / file for name, file in weights.items()}
        else:
            self._files = {
                name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)
            }
        if not self._files:
            raise BridgeError(f"{directory} has no safetensors files")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def parts(self, fqn: str, native: Native, module: Any) -> list[torch.Tensor] | None:
        """The global tensors that vLLM's parameter `fqn` (of `module`) was made of; None when names do not tell.

        A fused linear's part stands in the checkpoint under its own name in the module's place; the tensors of
        routed experts are stacked along a new dim 0.
        """
        prefix, _, name = fqn.rpartition(".")
        if name in ("w13_weight", "w2_weight"):
            parts = [part.name for part in native.parts] or [module.ckpt_down_proj_name]
            names = [
                [f"{module.layer_name}.{expert}.{part}.weight" for expert in range(native.shape[0])]
                for part in parts
            ]
            if not all(each in self for part in names for each in part):
                return None
            return [torch.stack([self[each] for each in part]) for part in names]
        parent = prefix.rpartition(".")[0]
        names = [f"{parent}.{part.name}.{name}" for part in native.parts] or [fqn]
        return [self[each] for each in names] if all(each in self for each in names) else None


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
