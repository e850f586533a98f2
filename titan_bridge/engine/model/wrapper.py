"""`TitanForCausalLM`: a TorchTitan decoder behind the interface vLLM expects of a model.

TorchTitan's own module classes are built, sharded by TorchTitan's own `parallelize`, and run. What serving
changes is listed in `build.py`: paged attention, routed experts behind an opaque operator, one collective for
each declared boundary, and rotary tables gathered once a step instead of once a layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from titan_bridge import cpu
from titan_bridge.checkpoint import Checkpoint
from titan_bridge.checkpoint.load import Loaded, load_into
from titan_bridge.engine.cpu.packing import Ahead, Loading, Packing
from titan_bridge.engine.cpu.windows import keep_keys_together
from titan_bridge.engine.loading.stream import WeightLoader
from titan_bridge.engine.log import logger_of
from titan_bridge.engine.model.attention import bind_sinks, windows
from titan_bridge.engine.model.build import build
from titan_bridge.engine.model.compiled import name_compiled_step
from titan_bridge.engine.model.fsdp import drop_gathered, drop_head, gather_head, head
from titan_bridge.engine.model.groups import group_of
from titan_bridge.engine.model.latent import derive
from titan_bridge.engine.model.lora import AdapterManager, Target, targets
from titan_bridge.engine.options import titan_options
from titan_bridge.errors import BridgeError
from titan_bridge.models.experts import local
from titan_bridge.models.peft import WEIGHT

logger = logger_of(__name__)


def _compiles(vllm_config: VllmConfig) -> bool:
    """FSDP's gathers are hooks that one graph cannot hold."""
    dp = vllm_config.parallel_config.data_parallel_size
    return not titan_options(vllm_config.additional_config).shards(dp)


HIDDEN = "hidden_states"
"""What one pipeline stage hands on to the next, by vLLM's name."""


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0}, enable_if=_compiles
)
class TitanForCausalLM(nn.Module):
    """Any TorchTitan family with a file under `models/` and one under `parallelize/`."""

    is_text_generation_model = True
    supports_pp = True
    supports_lora = True  # and what vLLM asks of a model that does
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {}
    lora_skip_prefixes: ClassVar[list[str]] = []
    is_3d_moe_weight = is_non_gated_moe = False
    lora_manager = None
    adapter_manager = AdapterManager

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        built = build(vllm_config)
        setup = built.setup
        name_compiled_step(vllm_config, setup, built.stage)
        self.model = built.model
        self.ropes = built.ropes
        self.setup = setup
        self.layout = built.layout
        self.stage = built.stage
        self._first, self._last = built.stage == 0, built.stage == setup.sizes.pp - 1
        self.attention = built.attention
        self.rows = built.rows
        keep_keys_together(vllm_config, windows(self.model))
        self.vocab_size = setup.hf["vocab_size"]
        self.dtype = vllm_config.model_config.dtype
        tensors = self.tensors()
        # This rank's local tensor of every parameter and persistent buffer that its stage has, by FQN.
        self.live = {fqn: local(tensors[fqn].detach()) for fqn in self.layout.params if fqn in tensors}
        # vLLM takes an adapter whose modules have these last names.
        self.embedding_modules = dict.fromkeys(self._adapted_names(), "")
        self.source: Path | None = None  # the directory that was read last
        self.packing = Packing(self.model, self.live, keep=vllm_config.weight_transfer_config is not None)
        group = group_of(setup.sizes.at("lm_head"))
        everywhere = current_platform.use_all_gather() or self.rows is not None
        gather = group.all_gather if everywhere else group.gather
        self._gather = gather if group.world_size > 1 else None
        logger.info("Serving TorchTitan's %s: %s", type(self.model).__name__, built.describe())

    embedding_modules: Mapping[str, str] = MappingProxyType({})

    def tensors(self) -> dict[str, torch.Tensor]:
        """TorchTitan's parameters and buffers as they are now, by FQN; a tied one has both its names."""
        return dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())

    def adapter_targets(self) -> Iterator[Target]:
        """The linear layers that may have LoRA adapters."""
        return targets(self.model, self.setup)

    def names_elsewhere(self) -> set[str]:
        """Hugging Face's names of the modules of other pipeline stages."""
        views = self.setup.family.views(self.setup.hf, padded_vocab=self.setup.padded_vocab)
        return {
            view.name.removesuffix(WEIGHT)
            for view in views
            if view.fqn not in self.live and view.name.endswith(WEIGHT)
        }

    def _adapted_names(self) -> set[str]:
        own = {name for target in self.adapter_targets() for name in target.names}
        return {name.rpartition(".")[2] for name in own | self.names_elsewhere()}

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, `(T,)` int to `(T, D)`."""
        return self.model.tok_embeddings(input_ids.unsqueeze(0)).squeeze(0)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """What a stage receives, `(batch_size, D)`; vLLM keeps it and copies each step's into it."""
        width = self.setup.hf["hidden_size"]
        return IntermediateTensors({HIDDEN: torch.zeros(batch_size, width, dtype=dtype, device=device)})

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states before the head: `(T,)` int ids and positions to `(T, D)` in the model's dtype.

        A pipeline stage takes those of the one before it, and returns its own for the next.
        """
        if inputs_embeds is not None or (self._first and input_ids is None):
            raise NotImplementedError("prompt embeddings are not supported; send token ids")
        if not self._first:
            assert intermediate_tensors is not None
            input_ids = intermediate_tensors[HIDDEN]
        assert input_ids is not None
        if self.setup.sharded:
            drop_head(self.model)
        rows = self.rows
        ids = input_ids if rows is None else rows.all_ids(input_ids)
        h_BLD = self.model(ids.unsqueeze(0), self.ropes.gather(positions))
        if self.setup.sharded:
            gather_head(self.model)
        h_TD = h_BLD.squeeze(0) if rows is None else rows.own(h_BLD.squeeze(0))
        return h_TD if self._last else IntermediateTensors({HIDDEN: h_TD})

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """`(T, D)` to `(T, vocab)`; None on ranks that the platform does not gather to."""
        if self.rows is not None:
            return self.rows.through_head(hidden_states, cast(Any, self._logits))
        return self._logits(hidden_states)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        if self.setup.sharded:
            logits_TV = head(self.model, hidden_states)
        else:
            logits_TV = self.model.lm_head(hidden_states)
        if self._gather is not None:
            logits_TV = self._gather(logits_TV)
        return None if logits_TV is None else logits_TV[..., : self.vocab_size]

    @functools.cached_property
    def _loader(self) -> WeightLoader:
        setup = self.setup
        return WeightLoader(
            self.live,
            self.layout,
            dist.get_rank(),
            setup.family.views(setup.hf, padded_vocab=setup.padded_vocab),
            setup.family.optional_views(setup.hf, padded_vocab=setup.padded_vocab),
            lambda name: setup.family.ignores(name, setup.hf),
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy this rank's slices of Hugging Face tensors into the live parameters; may be called again."""
        with self._loading():
            return self._loader.load(weights)

    def load_checkpoint(self, checkpoint: Checkpoint) -> Loaded:
        """Fill the live parameters from an open checkpoint of any format, reading only this rank's boxes."""
        with self._loading(piecemeal=True) as loading:
            self.loaded = load_into(
                checkpoint,
                self.live,
                self.layout,
                dist.get_rank(),
                family=self.setup.family,
                hf=self.setup.hf,
                padded_vocab=self.setup.padded_vocab,
                buffers=self.setup.buffers(self.layout),
                begin=loading.begin,
                arrived=loading.arrived,
            )
        return self.loaded

    @contextlib.contextmanager
    def _loading(self, *, piecemeal: bool = False) -> Iterator[Loading]:
        with self.packing.loading(piecemeal=piecemeal) as loading:
            yield loading
        self._derive()
        if self.setup.sharded:
            drop_gathered(self.model)
        if current_platform.is_cpu():  # from here on: what loading used is given back
            cpu.keep_freed_memory()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: vLLM's `save_sharded_state` and tensorizer save it, and packed weights are not in it."""
        raise BridgeError(
            "save_sharded_state is not supported with model_impl='torchtitan', and not needed: each rank "
            "reads only its own slices of any checkpoint"
        )

    def weights_changed(self, changed: Iterable[torch.Tensor], ahead: Ahead | None = None) -> None:
        """Bring everything that is derived from weights up to date; whoever writes into kept parameters calls it.

        `changed` are the live parameters that were written; `ahead`, what `packing.ahead` has made of them before.
        """
        if self.setup.sharded:
            drop_gathered(self.model)
        self.packing.refresh(changed, ahead)
        self._derive()

    def _derive(self) -> None:
        """What attention layers of vLLM's keep besides our parameters."""
        bind_sinks(self.model, self.dtype)
        derive(self.model, self.dtype)
