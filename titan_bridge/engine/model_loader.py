"""vLLM's load format "titan": each rank reads its own boxes of whatever checkpoint lies in the model directory.

Hugging Face safetensors, DCP as the trainer left it, and engine files, with no conversion step. The preflight
chooses it for `load_format="auto"`; every other format goes through `load_weights`.
"""

from __future__ import annotations

import time
from typing import Any

from torch import nn
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from titan_bridge.checkpoint.finite import not_finite_lines
from titan_bridge.checkpoint.model_dir import LOAD_FORMAT, weights_directory
from titan_bridge.checkpoint.open import open_checkpoint
from titan_bridge.errors import BridgeError

logger = init_logger(f"vllm.{__name__}")  # under vLLM's logger, whose handlers and level it shares


@register_model_loader(LOAD_FORMAT)
class TitanModelLoader(BaseModelLoader):
    """Reads with `titan_bridge.checkpoint`; serves TorchTitan's classes only."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing is downloaded: the model is a directory."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill the live parameters of `model` (a `TitanForCausalLM`)."""
        served: Any = model
        if not hasattr(served, "load_checkpoint"):
            raise BridgeError(
                f"load_format={LOAD_FORMAT!r} needs model_impl='torchtitan'; got {type(model).__name__}"
            )
        directory = weights_directory(model_config.model, served.plan.options.step)
        if directory is None:
            raise BridgeError(
                f"{model_config.model} holds no checkpoint that load_format={LOAD_FORMAT!r} reads"
            )
        started = time.perf_counter()
        with open_checkpoint(directory) as checkpoint:
            loaded = served.load_checkpoint(checkpoint)
        logger.info(
            "Read %.1f MiB of the %.1f MiB in %s on this rank (planned %.1f MiB) in %.2f s",
            loaded.bytes_read / 2**20,
            loaded.bytes_total / 2**20,
            directory,
            loaded.bytes_planned / 2**20,
            time.perf_counter() - started,
        )
        dtype = str(model_config.dtype).removeprefix("torch.")
        if loaded.dtypes != (dtype,):
            logger.warning("%s holds %s; it is served in %s", directory, ", ".join(loaded.dtypes), dtype)
        for line in not_finite_lines(loaded.nan, loaded.inf):
            logger.warning("%s: %s", directory, line)
