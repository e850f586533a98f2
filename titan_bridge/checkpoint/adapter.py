"""LoRA adapters as files: out of a checkpoint that TorchTitan wrote into PEFT's folder, and back into a DCP.

They are small, so that they are read whole.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.model_dir import weights_directory
from titan_bridge.checkpoint.open import open_checkpoint
from titan_bridge.checkpoint.quantized import ComputedCheckpoint
from titan_bridge.checkpoint.staging import Staging
from titan_bridge.errors import BridgeError
from titan_bridge.json_file import read_json_object
from titan_bridge.models import family_for
from titan_bridge.models.peft import PREFIX, WEIGHT, adapter_names, from_peft, to_peft
from titan_bridge.sharding.boxes import Box

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Names of PEFT's initialisations that leave the base weights as they are. Others (pissa, olora, corda, loftq, lora_ga)
take the first product off them, so that the adapter belongs to weights that no checkpoint has."""


def is_adapter(folder: Path) -> bool:
    """Whether PEFT's files lie there."""
    return (folder / CONFIG).is_file()


def write_peft(
    source: Path,
    target: Path,
    *,
    hf: Mapping[str, Any],
    alpha: float,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Write the adapter in a checkpoint by TorchTitan's names as a PEFT folder; how many tensors.
    `source` is a DCP, or a training run; `hf` the model's config.json; by `alpha` over the rank products are scaled.
    Raises BridgeError: no adapter in the checkpoint, or one that does not fit the model."""
    with open_checkpoint(weights_directory(str(source)) or source) as checkpoint:
        found = {name: checkpoint.read(name) for name in adapter_names(checkpoint.tensors)}
    if not found:
        raise BridgeError(f"{source} has no LoRA adapter: no tensor is called NAME.lora_a.weight")
    tensors = to_peft(found, family_for(hf).views(hf))
    (rank,) = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    modules = sorted({name.split(".")[-3] for name in tensors})
    fixed = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    config = {**fixed, "r": rank, "lora_alpha": alpha, "target_modules": modules}
    if dry_run:
        return len(tensors)
    with _beside(target, overwrite=overwrite) as made:
        (made / CONFIG).write_text(json.dumps(config, indent=2))
        save_file(tensors, made / TENSORS, metadata={"format": "pt"})
    return len(tensors)


def write_dcp(
    source: Path, target: Path, *, hf: Mapping[str, Any], overwrite: bool = False, dry_run: bool = False
) -> int:
    """Write a PEFT folder's adapter as a DCP by TorchTitan's names; how many tensors. Arguments as above.
    Raises BridgeError: not a plain LoRA, or one that TorchTitan's cannot be."""
    tensors = from_peft(_read_adapter(source)[1], family_for(hf).views(hf))
    if dry_run:
        return len(tensors)
    with _beside(target, overwrite=overwrite) as made:
        import torch.distributed.checkpoint as dcp  # noqa: PLC0415  brings DTensor, which reads do without

        dcp.save(dict(tensors), checkpoint_id=made, no_dist=True)
    return len(tensors)


def merged(checkpoint: Checkpoint, adapter: Path) -> ComputedCheckpoint:
    """A Hugging Face checkpoint with a PEFT folder's adapter in it.
    Raises BridgeError: another format, no plain LoRA, or matrices that fit no weight."""
    if checkpoint.format != "hf":
        raise BridgeError(
            f"--merge-lora: {checkpoint.path} is {checkpoint.format}; allowed: hf (see --to hf)"
        )
    config, held = _read_adapter(adapter)
    scale = config["lora_alpha"] / config["r"]
    compute, shapes = {}, {}
    for name in [name for name in held if name.endswith(f".lora_A{WEIGHT}")]:
        stem = name.removesuffix(f".lora_A{WEIGHT}")
        weight = stem.removeprefix(PREFIX) + WEIGHT
        a, b = held.pop(name).float(), held.pop(f"{stem}.lora_B{WEIGHT}", torch.zeros(0, 0)).float()
        compute[weight] = partial(_sum, checkpoint, weight, b * scale, a)
        shapes[weight] = b.shape[0], a.shape[1]
    stored = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    left = sorted([*held, *(name for name, shape in shapes.items() if stored.get(name) != shape)])
    if left:
        raise BridgeError(f"--merge-lora {adapter}: {', '.join(left[:3])} fit no weight of {checkpoint.path}")
    stated = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    return ComputedCheckpoint(**stated, raw=checkpoint, compute=compute)


def _sum(raw: Checkpoint, name: str, b: torch.Tensor, a: torch.Tensor, box: Box) -> torch.Tensor:
    """A box of a weight with the product of B `(out, rank)`, scaled, and A `(rank, in)`, both float32, added."""
    rows, columns = box.slices
    return torch.addmm(raw.read(name, box).float(), b[rows], a[:, columns])


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """adapter_config.json and the tensors of a plain LoRA."""
    if not is_adapter(folder):
        raise BridgeError(f"{folder} is no LoRA adapter: it has no {CONFIG}")
    config = read_json_object(folder / CONFIG)
    plain = {"use_dora": False, "use_rslora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}
    for key, allowed in plain.items():
        if config.get(key, allowed) not in (allowed, None):
            raise BridgeError(f"{folder / CONFIG}: {key}={config[key]!r} is not read; allowed: {allowed!r}")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise BridgeError(f"{folder / CONFIG}: {key}={value!r}; it must be a number above 0")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _INITS:
        raise BridgeError(
            f"{folder / CONFIG}: init_lora_weights={init!r} trains beside other base weights than the model's; "
            f"allowed: true, false, {', '.join(_INITS)} (save with PEFT's path_initial_model_for_weight_conversion)"
        )
    if not (folder / TENSORS).is_file():
        raise BridgeError(f"{folder} has no {TENSORS}")
    held = load_file(folder / TENSORS)
    for name, tensor in held.items():
        for dim, (end, what) in enumerate(((f".lora_A{WEIGHT}", "rows"), (f".lora_B{WEIGHT}", "columns"))):
            if name.endswith(end) and (tensor.ndim != 2 or tensor.shape[dim] != config["r"]):
                raise BridgeError(
                    f"{folder / TENSORS}: {name} has shape {tuple(tensor.shape)}; a matrix of r={config['r']} {what} "
                    f"is wanted ({CONFIG})"
                )
    return config, held


@contextlib.contextmanager
def _beside(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A hidden folder that takes the target's place in the end; see `staging`."""
    with contextlib.closing(Staging(target)) as staging:
        staging.check(overwrite=overwrite)
        staging.begin("adapter", resume=False)
        yield staging.path
        staging.publish((), overwrite=overwrite, fsync=False)
