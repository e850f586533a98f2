"""What a model family is: the two-way road between a Hugging Face checkpoint and TorchTitan's own model.

A family is one file in this package that defines ``FAMILY``, and one of the same name in ``parallelize/``; `registry`
finds it, and those of other packages.
Importing it must not import TorchTitan, which takes two seconds: what only names tensors does without. So a family
imports TorchTitan where it makes a config tree.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

from titan_bridge.errors import BridgeError
from titan_bridge.json_file import read_json_object
from titan_bridge.parallelize import ShardingRules, rules_of
from titan_bridge.sharding.view import View

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder
    from torchtitan.protocols.model_spec import ModelSpec
    from transformers import PreTrainedConfig

    from titan_bridge.models.adapter import Adapter


class Family(ABC):
    """Maps configs and weights of some Hugging Face architectures to one TorchTitan model class and back.

    Every method that takes ``hf`` takes a parsed config.json and raises ``UnsupportedModelError`` for
    whatever it states that TorchTitan's model cannot compute. No method reads weights.
    """

    name: str
    """Family name, e.g. ``"qwen3"``."""
    architectures: tuple[str, ...]
    """Names in config.json's ``architectures``, e.g. ``("LlamaForCausalLM",)``."""
    takes_policy: bool = False
    """Whether a parallelism policy may split its layers each in its own way. Each must take whole
    hidden states and return whole ones, as TorchTitan's do without sequence parallelism."""
    model_types: Mapping[str, str] = MappingProxyType({})
    """config.json's ``model_type`` by architecture, where another one is refused, e.g. ``{"LlamaForCausalLM":
    "llama"}``."""

    @property
    @abstractmethod
    def model_class(self) -> type[Decoder]:
        """TorchTitan's model, e.g. ``Llama3Model``."""

    @abstractmethod
    def model_config(
        self, hf: Mapping[str, Any], *, padded_vocab: int | None = None, expert_bias: bool = False
    ) -> Decoder.Config:
        """A new TorchTitan config tree: fused qkv, flex attention (varlen where there are windows), no sharding yet.

        Nothing in it is shared between layers, so a caller may replace
        ``layers[i].attention.inner_attention``.

        Args:
            hf: Parsed config.json.
            padded_vocab: Rows of the embedding and the head if more than the checkpoint has (tp must divide
                them); rows from the checkpoint's ``vocab_size`` on stand for no token.
            expert_bias: Give MoE layers TorchTitan's persistent ``expert_bias_E`` buffer (load balancing
                without an auxiliary loss). Hugging Face checkpoints have no such tensor.
        """

    @abstractmethod
    def views(
        self, hf: Mapping[str, Any], *, padded_vocab: int | None = None, fused_qkv: bool = True
    ) -> tuple[View, ...]:
        """Every tensor that a Hugging Face checkpoint of this config must have, as a view of a TorchTitan
        tensor.

        Args:
            hf: Parsed config.json.
            padded_vocab: As in ``model_config``.
            fused_qkv: Onto the live model's ``wqkv``; else onto ``wq``, ``wk``, ``wv``, the names that
                TorchTitan's state dict and its DCP checkpoints use.
        """

    def architecture(self, *, experts: bool) -> str:
        """The name for config.json of a model with or without a mixture of experts; the only one, where that is all."""
        return self.architectures[0]

    def optional_views(self, hf: Mapping[str, Any], *, padded_vocab: int | None = None) -> tuple[View, ...]:
        """Tensors that a checkpoint may have besides: ``lm_head.weight`` tied to the embedding."""
        return ()

    def tied_names(self, hf: Mapping[str, Any]) -> dict[str, str]:
        """FQNs that are another name of one parameter, e.g. ``{"lm_head.weight":
        "tok_embeddings.weight"}``."""
        return {}

    def expert_biases(self, hf: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """FQN and global shape of the float32 buffers of ``model_config(hf, expert_bias=True)``.

        Where Hugging Face knows them they have a view, too, and every checkpoint has them.
        """
        return {}

    def ignores(self, name: str, hf: Mapping[str, Any]) -> bool:
        """Whether a checkpoint's tensor ``name`` is left out: the model computes it for itself, or has no such part."""
        return name.endswith(".self_attn.rotary_emb.inv_freq")

    @property
    def sharding(self) -> ShardingRules:
        """``set_sharding`` and ``shard_placement_fn``: a module or any object that has them; see ``parallelize``."""
        return rules_of(self.name)

    @property
    def config_class(self) -> type[PreTrainedConfig] | None:
        """A class for config.json whose ``model_type`` transformers does not know; its module must be importable."""
        return None

    def adapters(self) -> Mapping[type, Adapter]:
        """Adapters of the config classes that this family brings, beside those that are common."""
        return {}

    def flavors(self) -> Mapping[str, Any]:
        """Models of this class that have a name, e.g. ``{"debugmodel": ..., "8B": ...}``: by default what the package
        of the model class calls ``NAME_configs``, as TorchTitan's do."""
        found = (value for name, value in vars(self._package).items() if name.endswith("_configs"))
        return next(found, {})

    def model_spec(self, flavor: str) -> ModelSpec:
        """How TorchTitan trains one of ``flavors()``: by default what its package's ``model_registry`` says.

        Models of other sizes are trained in the same way, with the config tree of ``model_config``.
        """
        return self._package.model_registry(flavor)

    @property
    def _package(self) -> ModuleType:
        return importlib.import_module(self.model_class.__module__.rpartition(".")[0])

    @abstractmethod
    def hf_config(self, config: Decoder.Config, *, dtype: str = "bfloat16") -> dict[str, Any]:
        """config.json for a TorchTitan config with weights of ``dtype``: the reverse of ``model_config``."""


def load_hf_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parsed config.json of a model directory (or of the file itself).

    Raises:
        BridgeError: No such directory, no config.json in it, or a file that is not a JSON object.
    """
    directory = Path(path)
    file = directory if directory.is_file() else directory / "config.json"
    if not file.is_file():
        what = f"{directory} has no config.json" if directory.is_dir() else f"{directory} does not exist"
        raise BridgeError(f"{what}; give a directory with a Hugging Face checkpoint")
    return read_json_object(file)
