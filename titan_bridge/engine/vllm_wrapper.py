"""`TitanForCausalLM`: a TorchTitan decoder behind the interface vLLM expects of a model.

TorchTitan's own module classes are built, sharded by TorchTitan's own `parallelize`, and run. What serving
changes is listed in `build.py`: paged attention, routed experts behind an opaque operator, one collective for
each declared boundary, and rotary tables gathered once a step instead of once a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_gather
from vllm.logger import init_logger
from vllm.platforms import current_platform

from titan_bridge.engine.build import build
from titan_bridge.engine.loader import WeightLoader

logger = init_logger(f"vllm.{__name__}")  # under vLLM's logger, whose handlers and level it shares


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0})
class TitanForCausalLM(nn.Module):
    """Any TorchTitan family with a file under `models/` and one under `parallelize/`."""

    is_text_generation_model = True
    supports_pp = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        built = build(vllm_config)
        plan = built.plan
        self.model = built.model
        self.ropes = built.ropes
        self.plan = plan
        self.layout = built.layout
        self.vocab_size = plan.hf["vocab_size"]
        self.loader = WeightLoader(
            built.held(),
            plan.family.views(plan.hf, padded_vocab=plan.padded_vocab),
            plan.family.optional_views(plan.hf, padded_vocab=plan.padded_vocab),
            plan.family.ignores,
        )
        self._tp = plan.sizes.tp
        self._gather = (
            tensor_model_parallel_all_gather if current_platform.use_all_gather() else tensor_model_parallel_gather
        )
        logger.info("Serving TorchTitan's %s: %s", type(self.model).__name__, built.describe())

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, `(T,)` int to `(T, D)`."""
        return self.model.tok_embeddings(input_ids.unsqueeze(0)).squeeze(0)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states before the head: `(T,)` int ids and positions to `(T, D)` in the model's dtype."""
        if inputs_embeds is not None:
            h_BLD = inputs_embeds.unsqueeze(0)
        else:
            assert input_ids is not None
            h_BLD = self.model.tok_embeddings(input_ids.unsqueeze(0))
        tables = self.ropes.gather(positions, h_BLD)
        for index, layer in enumerate(self.model.layers.values()):
            h_BLD = layer(h_BLD, None, tables[self.ropes.table_of_layer[index]])
        return self.model.norm(h_BLD).squeeze(0)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """`(T, D)` to `(T, vocab)`; None on ranks that the platform does not gather to."""
        logits_TV = self.model.lm_head(hidden_states)
        if self._tp > 1:
            logits_TV = self._gather(logits_TV)
        return None if logits_TV is None else logits_TV[..., : self.vocab_size]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy this rank's slices of Hugging Face tensors into the live parameters; may be called again."""
        return self.loader.load(weights)
