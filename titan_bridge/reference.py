"""TorchTitan's own forward pass on a Hugging Face checkpoint, in this process: what parity is measured
against.

It shares the config, the views and TorchTitan's modules with the engine, but neither vLLM's attention and KV
cache nor any parallelism.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchtitan.models.common.decoder import Decoder

from titan_bridge.checkpoint.load import load_into
from titan_bridge.checkpoint.model_dir import has_expert_bias, weights_directory
from titan_bridge.checkpoint.open import open_checkpoint
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes
from titan_bridge.model_layout import layout
from titan_bridge.models import Family, family_for, load_hf_config
from titan_bridge.models.adapters import keep_expert_dtype, use_plain_attention
from titan_bridge.models.build import build_on_meta, materialize
from titan_bridge.run_folder import model_and_step


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
    step: int | None = None,
    names: str | None = None,
) -> Reference:
    """Build the model that a checkpoint's config.json describes and fill it through the family's views.

    Args:
        model_dir: Directory with config.json and a checkpoint of any format, or the output of a training run.
        dtype: The weights are converted to it (routed experts included).
        device: Where the whole model must fit.
        step: Of a training run, the checkpoint to take; the last whole one if not given.
        names: As for `open_checkpoint`.

    Raises:
        UnsupportedModelError: The config states something TorchTitan's model cannot compute.
        BridgeError: Files that cannot be read; missing, unexpected or mis-shaped tensors, all of them named.
    """
    model_dir, step = model_and_step(model_dir, step)
    hf = load_hf_config(model_dir)
    family = family_for(hf)
    config = family.model_config(hf, expert_bias=has_expert_bias(model_dir, step, names))
    keep_expert_dtype(config)
    use_plain_attention(config)
    model = materialize(build_on_meta(config, dtype=dtype), device).eval().requires_grad_(False)
    directory = weights_directory(model_dir, step)
    if directory is None:
        raise BridgeError(f"{model_dir} holds no weights; give a directory with a checkpoint")
    where = layout(config, Sizes(), dtype=dtype)
    live = dict(model.named_parameters()) | dict(model.named_buffers())
    known = {view.fqn for view in family.views(hf)}
    with open_checkpoint(directory, names=names) as checkpoint:
        load_into(
            checkpoint,
            {fqn: live[fqn] for fqn in where.params},
            where,
            0,
            family=family,
            hf=hf,
            padded_vocab=hf["vocab_size"],
            buffers={fqn: param for fqn, param in where.params.items() if fqn not in known},
        )
    return Reference(family=family, model=model)
