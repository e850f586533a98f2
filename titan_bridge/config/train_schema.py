"""What a TOML file for training may say. Every field's docstring is its description in the JSON Schema.

Values under [trainer] are TorchTitan's own: their keys and types are those of its `Trainer.Config`, and
`titan_bridge/train/overrides.py` checks them against it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from titan_bridge.config.reader import walk
from titan_bridge.config.schema import CONFIG, Positive, Text

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

OWNED_BY_US = {
    "parallelism.data_parallel_shard_degree": "parallel.dp",
    "parallelism.data_parallel_replicate_degree": "parallel.dp_replicate",
    "parallelism.tensor_parallel_degree": "parallel.tp",
    "parallelism.expert_parallel_degree": "parallel.ep",
    "dump_folder": "out",
    "checkpoint.folder": "out",
    "model_spec": "model.config",
}
"""Field of `Trainer.Config` -> the key of ours that says it: such a key under [trainer] would be said twice."""

OWNED_BY_DATA = {
    "hf_assets_path": "data.tokenizer",
    "dataloader.dataset": "data.path",
    "dataloader.dataset_path": "data.path",
}
"""The same, unless the data are those of a `model.config` function."""


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ModelSizes:
    """Explicit model sizes by their names in a Hugging Face config.json; experts make it a mixture of experts."""

    hidden_size: Positive
    """Width of the model."""
    intermediate_size: Positive | None = None
    """Hidden width of the dense feed-forward; needed where a layer has one."""
    num_hidden_layers: Positive
    """Layers."""
    num_attention_heads: Positive
    """Query heads."""
    num_key_value_heads: Positive | None = None
    """Key and value heads; none: as many as query heads (a mixture of experts: 4)."""
    head_dim: Positive | None = None
    """Width of a head; none: what the family takes for its default."""
    vocab_size: Positive | None = None
    """Rows of the embedding; none: the tokenizer's, rounded up to a multiple of 64."""
    max_position_embeddings: Positive = 2048
    """Longest sequence in tokens that the model may be served with."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Epsilon of the norms."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = False
    """One tensor for embedding and head."""
    num_experts: Positive | None = None
    """Experts of a layer."""
    num_experts_per_tok: Positive | None = None
    """Experts that see a token."""
    moe_intermediate_size: Positive | None = None
    """Hidden width of an expert."""
    norm_topk_prob: bool = True
    """Scale the chosen experts' weights to the sum 1."""
    other: dict[str, Any] = Field(default_factory=dict)
    """Further fields of config.json, for instance `n_routed_experts = 8` (deepseek_v3)."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Model:
    """What is trained: a family with one of TorchTitan's flavors or explicit sizes, or a Python function."""

    family: Text | None = None
    """Model family, for instance qwen3; `titan-bridge doctor` lists them."""
    flavor: Text | None = None
    """One of TorchTitan's own flavors of the family, for instance "debugmodel" or "8B"."""
    sizes: ModelSizes | None = None
    """Explicit sizes instead of a flavor."""
    config: str | None = None
    """"module:function" that returns a TorchTitan `Trainer.Config`, instead of family and flavor or sizes."""

    def __post_init__(self) -> None:
        if self.config is not None:
            if self.family or self.flavor or self.sizes:
                raise ValueError(
                    "model.config is given together with family, flavor or sizes; give one of the two"
                )
            if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.config):
                raise ValueError(
                    f"model.config = {self.config!r} is not module:function; "
                    "write for instance torchtitan.models.llama3.config_registry:llama3_debugmodel"
                )
        elif self.family is None:
            raise ValueError("the key model.family is missing; give it, or model.config = module:function")
        elif (self.flavor is None) == (self.sizes is None):
            given = "both" if self.flavor else "neither"
            raise ValueError(f"model.flavor and [model.sizes]: {given} given; give exactly one")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Data:
    """Text to train on, and how it becomes tokens."""

    path: Annotated[tuple[Text, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = ("stdlib",)
    """Text files or folders of them; "stdlib" is the Python standard library's sources. One path or a list."""
    pattern: Text = "*"
    """Name of the files to take from folders, for instance "*.txt"; files that are not text are left out."""
    tokenizer: Text = "train"
    """"bytes", "train" (byte-level BPE trained on the text), or a folder with tokenizer.json."""
    vocab_size: Annotated[int, Field(ge=260)] = 1024
    """Entries of a tokenizer that is trained, special tokens included."""
    longest: Annotated[int, Field(ge=64)] = 16384
    """Bytes of the longest document: a longer file is several, cut at ends of lines, which mixes them better."""
    seed: int = 0
    """Order of the documents."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TrainParallel:
    """Degrees. Processes = dp_replicate * dp * tp."""

    dp: Positive | None = None
    """Ranks over which FSDP shards (data_parallel_shard_degree); none: what nproc leaves, or 1."""
    tp: Positive | None = None
    """Tensor parallel ranks (tensor_parallel_degree)."""
    ep: Positive | None = None
    """Ranks that share the experts (expert_parallel_degree): 1 or a divisor of dp * tp."""
    dp_replicate: Positive | None = None
    """Copies of the sharded model (data_parallel_replicate_degree); more than 1 is HSDP."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TrainConfig:
    """One TOML file for `titan-bridge train`."""

    out: Text | None = None
    """Folder for checkpoints, logs and TensorBoard; none: out/train/ and the TOML file's name."""
    nproc: Positive | None = None
    """Processes; none: the product of the degrees."""
    lr: PositiveFloat | None = None
    """Learning rate of every parameter group; none: 1e-3, or what model.config says."""
    model: Model
    """The model."""
    data: Data | None = None
    """The text; none: the standard library's sources, or what model.config says."""
    parallel: TrainParallel = Field(default_factory=TrainParallel)
    """Degrees of parallelism."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Any field of TorchTitan's `Trainer.Config` by path, for instance `training.steps = 300`."""

    def __post_init__(self) -> None:
        owned = OWNED_BY_US | (OWNED_BY_DATA if self.uses_text else {})
        for path, _ in walk(self.trainer):
            for theirs, ours in owned.items():
                if path == theirs or path.startswith(f"{theirs}."):
                    raise ValueError(f"trainer.{path} is set by {ours}; write it there")

    @property
    def uses_text(self) -> bool:
        """Whether the data are text of ours and not those of a `model.config` function."""
        return self.data is not None or self.model.config is None
