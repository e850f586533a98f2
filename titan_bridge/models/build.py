"""Build a TorchTitan model from a config tree: first without memory, then with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.module import Module


def build_on_meta(config: Decoder.Config, *, dtype: torch.dtype) -> Decoder:
    """The model with parameters of ``dtype`` on the meta device: global shapes, no memory.

    Buffers keep the dtype that TorchTitan gives them (rotary caches and expert biases are float32 or
    complex64).
    """
    with default_dtype(dtype), torch.device("meta"):
        return config.build()


def materialize(model: Decoder, device: torch.device | str) -> Decoder:
    """Give a model on the meta device memory on ``device``, fill its buffers and tie what is tied; in place.

    Parameters are left uninitialised. The tie made on the meta device does not survive ``to_empty``, so the
    head is pointed at the embedding's new parameter here.
    """
    with default_dtype(torch.float32):
        model.to_empty(device=device)
        for module in model.modules():
            if isinstance(module, Module):
                module._init_self_buffers(buffer_device=torch.device(device))
    tie(model)
    return model


def tie(model: Decoder) -> None:
    """Make the head share the embedding's parameter where the config says so; in place, idempotent.

    Needed after ``to_empty`` from the meta device and after ``parallelize``: both register new parameters.
    """
    if model.enable_weight_tying and model.tok_embeddings is not None and model.lm_head is not None:
        model.lm_head.weight = model.tok_embeddings.weight


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype meanwhile, which TorchTitan's buffers take."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
