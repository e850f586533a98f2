"""vLLM's load format "titan": each rank reads its own boxes of whatever checkpoint lies in the model directory.

Hugging Face safetensors and DCP as the trainer left it, with no conversion step. The preflight
chooses it for `load_format="auto"`; every other format goes through `load_weights`.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from vllm.config import ModelConfig
from vllm.distributed import get_world_group
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.finite import not_finite_lines
from titan_bridge.checkpoint.model_dir import LOAD_FORMAT, open_named_either_way, weights_directory
from titan_bridge.checkpoint.open import open_checkpoint
from titan_bridge.checkpoint.verify import digest
from titan_bridge.engine.log import logger_of
from titan_bridge.errors import BridgeError
from titan_bridge.sharding.layout import dtype_name

if TYPE_CHECKING:
    from titan_bridge.engine.model.wrapper import TitanForCausalLM

logger = logger_of(__name__)


@register_model_loader(LOAD_FORMAT)
class TitanModelLoader(BaseModelLoader):
    """Reads with `titan_bridge.checkpoint`; serves TorchTitan's classes only."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing is downloaded: the model is a directory."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill the live parameters of `model` (a `TitanForCausalLM`, or the draft model beside one)."""
        if model_config.runner_type == "draft":  # vLLM's own class, which inherits the load format
            vllms = get_model_loader(dataclasses.replace(self.load_config, load_format="auto"))
            vllms.load_weights(model, model_config)
            return
        served: Any = model
        if not hasattr(served, "load_checkpoint"):
            raise BridgeError(
                f"load_format={LOAD_FORMAT!r} needs model_impl='torchtitan'; got {type(model).__name__}"
            )
        load(served, model_config.model, served.setup.options.step)


def load(model: TitanForCausalLM, path: str, step: int | None = None, *, again: bool = False) -> None:
    """Fill the live parameters of `model` on this rank; all ranks call it together.

    Args:
        path, step: As for `weights_directory`.
        again: The pattern of names was given for another checkpoint; this one may have our names instead.

    Raises:
        BridgeError: On every rank, before anything is written: one of them finds no checkpoint, or another one than
            the others. After that, what `load_into` says.
    """
    started = time.perf_counter()
    with _open_alike(model, path, step, again=again) as checkpoint:
        loaded = model.load_checkpoint(checkpoint)
    model.source = checkpoint.path
    logger.info(
        "Read %.1f MiB of the %.1f MiB in %s on this rank (planned %.1f MiB) in %.2f s",
        loaded.bytes_read / 2**20,
        loaded.bytes_total / 2**20,
        checkpoint.path,
        loaded.bytes_planned / 2**20,
        time.perf_counter() - started,
    )
    dtype = dtype_name(model.dtype)
    if loaded.dtypes != (dtype,):
        logger.warning("%s holds %s; it is served in %s", checkpoint.path, ", ".join(loaded.dtypes), dtype)
    for line in not_finite_lines(loaded.nan, loaded.inf):
        logger.warning("%s: %s", checkpoint.path, line)


def _open_alike(model: TitanForCausalLM, path: str, step: int | None, *, again: bool) -> Checkpoint:
    """Open the checkpoint that all ranks find at `path`, each on its own disk."""
    setup, names = model.setup, model.setup.options.names
    checkpoint, found, problem = None, "", None
    try:
        directory = weights_directory(path, step)
        if directory is None:
            raise BridgeError(
                f"{path} holds no weights that load_format={LOAD_FORMAT!r} reads; give the directory of safetensors, "
                "of a DCP or of a training run"
            )
        if again:
            checkpoint = open_named_either_way(directory, names, setup.family, setup.hf)
        else:
            checkpoint = open_checkpoint(directory, names=names)
        found = digest(checkpoint)
        where = f"{socket.gethostname()}:{directory.absolute()}"
    except BridgeError as error:
        where, problem = str(error), error
    group = get_world_group()
    answers: list[Any] = [None] * group.world_size
    # A rank that found nothing takes part, too, so that nobody waits for it.
    dist.all_gather_object(answers, (found, where), group=group.cpu_group)
    if problem is not None:
        raise problem
    ranks: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, answer in enumerate(answers):
        ranks[answer].append(rank)
    if len({answer[0] for answer in ranks}) > 1:
        said = "; ".join(f"rank {', '.join(map(str, own))}: {where}" for (_, where), own in ranks.items())
        raise BridgeError(f"the ranks find different weights, and would serve a mixture: {said}")
    assert checkpoint is not None
    return checkpoint
