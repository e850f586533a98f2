"""LoRA adapters in PEFT's format for small checkpoints, and the checkpoints with adapters merged into them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."


def adaptable(names: Iterator[str]) -> Iterator[str]:
    """Names of the weights that an adapter may be on: linear layers but routers, routed experts and the head."""
    for name in names:
        if name.endswith(("_proj.weight", "_with_mqa.weight")) and ".experts." not in name:
            yield name


def make_adapter(
    folder: Path,
    model: Path,
    *,
    seed: int,
    rank: int,
    alpha: float,
    layers: tuple[int, ...],
    only: str = "",
    **more: Any,
) -> Path:
    """An adapter on the layers' adaptable weights whose names contain `only`; its products are as large as weights.

    `more`: other keys of its config, which `merged` does not know.
    """
    generator = torch.Generator().manual_seed(seed)
    held = load_file(model / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for name in adaptable(iter(sorted(held))):
        if only not in name or not any(f".layers.{layer}." in name for layer in layers):
            continue
        out_features, in_features = held[name].shape
        stem = PREFIX + name.removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = 0.15 * torch.randn(rank, in_features, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(out_features, rank, generator=generator) / alpha
    assert tensors
    return write_adapter(folder, tensors, rank=rank, alpha=alpha, **more)


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], *, rank: int, alpha: float, **more: Any
) -> Path:
    folder.mkdir()
    modules = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules, "bias": "none"}
    config |= more
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(folder: Path, model: Path, adapter: Path) -> Path:
    """The checkpoint with an adapter's products added to its weights, in float64."""
    shutil.copytree(model, folder)
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    held, given = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in given if ".lora_A." in name]:
        weight = name.removeprefix(PREFIX).replace(".lora_A.", ".")
        product = given[name.replace(".lora_A.", ".lora_B.")].double() @ given[name].double()
        held[weight] = (held[weight].double() + scale * product).to(held[weight].dtype)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
