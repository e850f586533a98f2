"""TorchTitan's own forward pass on a Hugging Face checkpoint, in this process: what parity is measured
against.

It shares the config, the views and TorchTitan's modules with the engine, but neither vLLM's attention and KV
cache nor any parallelism.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torchtitan.models.common.decoder import Decoder

from titan_bridge.errors import BridgeError
from titan_bridge.models import Family, family_for, load_hf_config
from titan_bridge.models.attention import use_plain_attention
from titan_bridge.models.build import build_on_meta, materialize
from titan_bridge.models.experts import keep_expert_dtype


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A loaded model. ``model`` is TorchTitan's class with weights of one dtype on one device."""

    family: Family
    model: Decoder

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits ``[L, V]`` in the model's dtype for one sequence; row i belongs to the token after
        ``token_ids[i]``.

        Raises:
            BridgeError: No tokens, a token outside the vocabulary, or more tokens than rotary positions.
        """
        vocab, limit = self.model.config.vocab_size, self.model.config.max_seq_len
        if not 0 < len(token_ids) <= limit:
            raise BridgeError(f"{len(token_ids)} tokens given; allowed: 1 to max_position_embeddings={limit}")
        if not all(0 <= token < vocab for token in token_ids):
            raise BridgeError(
                f"token {max(token_ids, key=abs)} given; allowed: 0 to vocab_size-1={vocab - 1}"
            )
        device = self.model.norm.weight.device
        return self.model(torch.tensor([list(token_ids)], device=device))[0]

    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities ``[L, V]`` in float32, rows as in ``logits``."""
        return torch.log_softmax(self.logits(token_ids).float(), dim=-1)


def load_reference(
    model_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Reference:
    """Build the model that a checkpoint's config.json describes and fill it through the family's views.

    Args:
        model_dir: Directory with config.json and safetensors files.
        dtype: The weights are converted to it (routed experts included).
        device: Where the whole model must fit.

    Raises:
        UnsupportedModelError: The config states something TorchTitan's model cannot compute.
        BridgeError: Files that cannot be read; missing, unexpected or mis-shaped tensors, all of them named.
    """
    hf = load_hf_config(model_dir)
    family = family_for(hf)
    config = family.model_config(hf)
    keep_expert_dtype(config)
    use_plain_attention(family, hf, config)
    model = materialize(build_on_meta(config, dtype=dtype), device).eval().requires_grad_(False)
    _fill(model, family, hf, Path(model_dir))
    return Reference(family=family, model=model)


def reference_logprobs(model_dir: str | os.PathLike[str], token_ids: Sequence[int]) -> torch.Tensor:
    """Float32 log-probabilities ``[L, V]`` of one sequence on the CPU; see ``Reference.logprobs``."""
    return load_reference(model_dir).logprobs(token_ids)


def _fill(model: Decoder, family: Family, hf: Mapping[str, Any], model_dir: Path) -> None:
    """Copy each tensor of the checkpoint into its place, one at a time."""
    missing = {view.name: view for view in family.views(hf)}
    optional = {view.name: view for view in family.optional_views(hf)}
    targets = dict(model.named_parameters())
    wrong = []
    for name, tensor in _tensors(model_dir):
        if family.ignores(name) or name in optional:
            continue
        view = missing.pop(name, None)
        if view is None:
            wrong.append(f"unexpected {name}")
        elif tuple(tensor.shape) != view.shape:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, the config implies {view.shape}")
        else:
            target = targets[view.fqn].data
            view.write(target, tensor.to(dtype=target.dtype, device=target.device))
    wrong += [f"missing {name}" for name in missing]
    if wrong:
        raise BridgeError(f"{model_dir} does not hold what its config.json describes: {'; '.join(wrong)}")


def _tensors(model_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in a safetensors checkpoint, one file at a time."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({model_dir / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [model_dir / "model.safetensors"]
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield name, opened.get_tensor(name)
        except FileNotFoundError:
            raise BridgeError(
                f"{file} does not exist; give a directory with a safetensors checkpoint"
            ) from None
        except SafetensorError as error:
            raise BridgeError(f"{file} cannot be read: {error}; it may be truncated, copy it again") from None
