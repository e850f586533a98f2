"""What a TOML file for inference may say. Every field's docstring is its description in the JSON Schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from titan_bridge.mesh import Sizes
from titan_bridge.policy.schema import NO_POLICY, Policy, attention_width

CONFIG = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

Positive = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Dense = Literal["replicate", "shard"]

OWNED_BY_US = {
    "model": "model",
    "model_impl": "model_impl",
    "dtype": "dtype",
    "max_model_len": "max_model_len",
    "tensor_parallel_size": "parallel.tp",
    "data_parallel_size": "parallel.dp",
    "pipeline_parallel_size": "parallel.pp",
    "enable_expert_parallel": "parallel.ep",
}
"""vLLM option -> the key of ours that says it: such an option under [vllm] would be said twice."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Parallel:
    """How many ranks serve the model and what each axis does. World size = dp * pp * tp."""

    dp: Positive = 1
    """Data parallel groups (TorchTitan's dp_shard)."""
    tp: Positive = 1
    """Tensor parallel ranks in each group."""
    pp: Positive = 1
    """Pipeline stages in each group, of consecutive layers, as vLLM deals them out."""
    ep: Positive = 1
    """Ranks that share the experts: 1 (no expert parallelism), dp * tp, or a divisor of it."""
    dense: Dense = "replicate"
    """Dense weights over dp: whole on each group ("replicate") or 1/dp each, gathered layer by layer ("shard")."""
    attn_tp: Positive | None = None
    """Ranks of tp that attention is cut over, replicated over the rest: short for a rule in [parallelism]."""
    attention_dp: bool | Positive = False
    """Groups of tp ranks whose attention and KV cache have requests of their own: a number, or true for as many as tp
    would hold copies of the cache."""

    def __post_init__(self) -> None:
        _ = self.sizes  # refuses those that do not fit together
        if self.attn_tp and self.attention_dp:
            raise ValueError(
                f"parallel.attn_tp={self.attn_tp} and parallel.attention_dp={self.attention_dp}: groups cut attention "
                "over their own ranks; leave attn_tp out"
            )

    @property
    def sizes(self) -> Sizes:
        """The degrees."""
        return Sizes.of(self)

    @property
    def workers(self) -> int:
        """Of one engine."""
        return self.pp * self.tp


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Generate:
    """Prompts and sampling of `titan-bridge generate`."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("The capital of France is",)
    """Texts to continue."""
    max_tokens: Positive = 32
    """New tokens a prompt."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """0 takes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens that has this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens; 0 means all."""
    seed: int | None = None
    """Seed of the sampling; none: a new one each time."""
    ignore_eos: bool = False
    """Go on to max_tokens past the end-of-sequence token."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class InferConfig:
    """One TOML file for `serve`, `generate`, `parity` and `inspect`."""

    model: Text
    """Directory of the model (with config.json), relative to the working directory."""
    model_impl: Text = "torchtitan"
    """"torchtitan" for TorchTitan's classes; any value of vLLM's own --model-impl to compare with."""
    dtype: Dtype = "auto"
    """Type of weights and activations; "auto" takes the checkpoint's, but bfloat16 for a float32 checkpoint, as vLLM
    does: say float32 to compare numbers."""
    max_model_len: Positive | None = None
    """Longest sequence in tokens, prompt included; none: what the model's config allows."""
    parallel: Parallel = Field(default_factory=Parallel)
    """Sizes and layout."""
    parallelism: Policy = NO_POLICY
    """How each layer is split over the tp ranks: `axes` and `rules`; see titan_bridge/policy/README.md."""
    generate: Generate = Field(default_factory=Generate)
    """Prompts and sampling."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Any other engine option of vLLM by its Python name, for instance `enforce_eager = true`."""

    def __post_init__(self) -> None:
        for option in self.vllm:
            if ours := OWNED_BY_US.get(option):
                raise ValueError(f"vllm.{option} is set by {ours}; write it there")
        additional = self.vllm.get("additional_config")
        if additional is not None and not isinstance(additional, dict):
            raise ValueError(f"vllm.additional_config is {additional!r}; it must be a table")
        titan = (additional or {}).get("titan")
        if titan is not None and not isinstance(titan, dict):
            raise ValueError(f"vllm.additional_config.titan is {titan!r}; it must be a table")
        said = {name: f"parallel.{name}" for name in ("dense", "ep", "attention_dp")}
        for key, ours in {**said, "parallelism": "parallelism"}.items():
            if key in (titan or {}):
                raise ValueError(f"vllm.additional_config.titan.{key} is set by {ours}; write it there")
        if self.parallelism and self.parallel.attn_tp:
            raise ValueError(
                f"parallel.attn_tp={self.parallel.attn_tp} is short for a rule of parallelism, which has rules of its "
                "own; write it as one of them"
            )

    @property
    def policy(self) -> Policy:
        """The rules, or the one that `parallel.attn_tp` stands for."""
        return attention_width(self.parallel.attn_tp) if self.parallel.attn_tp else self.parallelism

    def additional_config(self) -> dict[str, Any]:
        """vLLM's `additional_config`, with our options under "titan" where they differ from the default."""
        given = dict(self.vllm.get("additional_config") or {})
        ours: dict[str, Any] = {}
        if self.parallel.dense != "replicate":
            ours["dense"] = self.parallel.dense
        if 1 < self.parallel.ep < self.parallel.sizes.most_ep:
            ours["ep"] = self.parallel.ep
        if self.parallel.attention_dp:
            ours["attention_dp"] = self.parallel.attention_dp
        if self.policy:
            ours["parallelism"] = self.policy.to_dict()
        if ours:
            given["titan"] = {**(given.get("titan") or {}), **ours}
        return given

    def engine_options(self) -> dict[str, Any]:
        """Keyword arguments for vLLM's engine, dp left out (offline it is one process a rank)."""
        options = {
            "model": self.model,
            "model_impl": self.model_impl,
            "dtype": self.dtype,
            "tensor_parallel_size": self.parallel.tp,
            "enable_expert_parallel": self.parallel.ep > 1,
            **self.vllm,
        }
        if self.parallel.pp > 1:
            options["pipeline_parallel_size"] = self.parallel.pp
        if self.max_model_len is not None:
            options["max_model_len"] = self.max_model_len
        if additional := self.additional_config():
            options["additional_config"] = additional
        return options


SCHEMAS = {"infer": InferConfig}
"""Kind of TOML file -> its class; the folder under configs/ has the name of the kind."""
