"""Small quantized checkpoints, in the formats of DeepSeek-V3 and gpt-oss as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from titan_bridge.checkpoint import open_checkpoint
from titan_bridge.models import load_hf_config
from titan_bridge.sharding.boxes import Box
from titan_bridge.testing import make_checkpoint

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict, quantization: dict | None) -> Path:
    """A checkpoint in one file with an index, which torch's reader wants."""
    folder.mkdir()
    config = config | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model-1.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_fp8(base: Path, **fields: Any) -> Path:
    """DeepSeek-V3 in `base` / "fp8", with every projection in blocks of FP8."""
    full = make_checkpoint(base / "full", "deepseek_v3", tokenizer=False, dtype=torch.bfloat16, **fields)
    tensors = {}
    for name, tensor in load_file(full / "model.safetensors").items():
        tensors[name] = tensor
        if "_proj" not in name:
            continue
        rows, columns = (-(-size // 128) for size in tensor.shape)
        scales = torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(name))) * 0.01 + 1e-4
        spread = scales.repeat_interleave(128, 0)[: tensor.shape[0]].repeat_interleave(128, 1)[
            :, : tensor.shape[1]
        ]
        tensors[name] = (tensor.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    return write(base / "fp8", tensors, load_hf_config(full), FP8)


def make_mxfp4(base: Path, **fields: Any) -> Path:
    """gpt-oss in `base` / "mxfp4", with its experts in blocks of MXFP4."""
    full = make_checkpoint(base / "full", "gpt_oss", tokenizer=False, dtype=torch.bfloat16, **fields)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in load_file(full / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(122, 126, shape, dtype=torch.uint8, generator=generator)
    return write(base / "mxfp4", tensors, load_hf_config(full), MXFP4)


def read(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor, whole."""
    with open_checkpoint(path) as checkpoint:
        made = {name: torch.empty(stored.shape, dtype=dtype) for name, stored in checkpoint.tensors.items()}
        for name, out in made.items():
            checkpoint.read_into(name, Box.whole(out.shape), out)
    return made


def multiplied_out(source: Path, folder: Path) -> Path:
    """A quantized checkpoint as a full one in float32, where products are not rounded to bfloat16."""
    config = load_hf_config(source) | {"dtype": "float32"}
    del config["quantization_config"]
    return write(folder, read(source, torch.float32), config, None)
