"""The package in own_family/ as somebody's else: installed into a folder, random weights for it, and what they compute.

Nothing here imports titan_bridge or the package: names, shapes and arithmetic are those of its Hugging Face checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

SOURCE = Path(__file__).parent / "own_family"
CONFIG = {
    "architectures": ["GatedForCausalLM"],
    "model_type": "gated",
    "vocab_size": 301,  # odd: padded at tp=2
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 32


def install(folder: Path) -> Path:
    """`pip install` without an index, from a copy: a build leaves its work beside pyproject.toml."""
    source = shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, timeout=120)
    return folder / "site"


def found_in(*folders: Path) -> dict[str, str]:
    """The environment of a process that finds the packages in `folders`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Random tensors by Hugging Face name; norms are near one."""
    generator = torch.Generator().manual_seed(seed)
    dim, hidden, vocab = (CONFIG[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv_heads = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"model.embed_tokens": (vocab, dim), "model.norm": (dim,), "lm_head": (vocab, dim)}
    for layer in range(LAYERS):
        of_layer = {
            "input_layernorm": (dim,),
            "post_attention_layernorm": (dim,),
            "self_attn.q_proj": (heads, dim),
            "self_attn.k_proj": (kv_heads, dim),
            "self_attn.v_proj": (kv_heads, dim),
            "self_attn.gate": (heads, dim),
            "self_attn.o_proj": (dim, heads),
            "mlp.gate_proj": (hidden, dim),
            "mlp.up_proj": (hidden, dim),
            "mlp.down_proj": (dim, hidden),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        made[f"{name}.weight"] = 1 + 0.1 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5
    return made


def make(folder: Path, seed: int = 0) -> Path:
    """A checkpoint of the package's model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logprobs(held: Mapping[str, torch.Tensor], token_ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities `(L, V)` in float64."""
    get = {name.removesuffix(".weight"): tensor.double() for name, tensor in held.items()}.__getitem__
    length = len(token_ids)
    halves = torch.arange(HEAD_DIM // 2, dtype=torch.float64)
    angles = torch.arange(length)[:, None] * CONFIG["rope_theta"] ** (-2 * halves / HEAD_DIM)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def norm(x_LD: torch.Tensor, name: str) -> torch.Tensor:
        return x_LD * (x_LD.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).rsqrt() * get(name)

    def heads(x_LD: torch.Tensor, name: str) -> torch.Tensor:
        return (x_LD @ get(name).T).unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1)

    def rotated(x_NLH: torch.Tensor) -> torch.Tensor:
        first, second = x_NLH.chunk(2, -1)
        return x_NLH * cos + torch.cat((-second, first), -1) * sin

    x_LD = get("model.embed_tokens")[list(token_ids)]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        h_LD = norm(x_LD, f"{name}.input_layernorm")
        q_NLH, k_nLH, v_nLH = (heads(h_LD, f"{name}.self_attn.{which}_proj") for which in "qkv")
        k_NLH, v_NLH = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (rotated(k_nLH), v_nLH))
        out_NLH = F.scaled_dot_product_attention(rotated(q_NLH), k_NLH, v_NLH, is_causal=True)
        gate_LD = torch.sigmoid(h_LD @ get(f"{name}.self_attn.gate").T)
        x_LD = x_LD + (out_NLH.transpose(0, 1).flatten(1) * gate_LD) @ get(f"{name}.self_attn.o_proj").T
        h_LD = norm(x_LD, f"{name}.post_attention_layernorm")
        up_LD = F.silu(h_LD @ get(f"{name}.mlp.gate_proj").T) * (h_LD @ get(f"{name}.mlp.up_proj").T)
        x_LD = x_LD + up_LD @ get(f"{name}.mlp.down_proj").T
    return (norm(x_LD, "model.norm") @ get("lm_head").T).log_softmax(-1)
