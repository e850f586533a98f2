"""What the families share: one reading of the common config fields, and the views of the common tensors.

Nothing here needs TorchTitan; `parts` has the config trees.

Dims: V vocabulary, D model, N query heads, n kv heads, H head; R = N/n + 2 is one kv head's queries, key and
value.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from titan_bridge.models import quantization
from titan_bridge.models.family import Family
from titan_bridge.models.fields import Fields
from titan_bridge.models.rope import RopeSettings
from titan_bridge.sharding.view import View


@dataclass(frozen=True, kw_only=True)
class DecoderDims:
    """Sizes and settings that every decoder's config.json states; ``vocab`` is without padding."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_is_implied: bool
    eps: float
    max_seq_len: int
    tied: bool
    init_std: float
    rope: RopeSettings

    @property
    def heads_per_kv(self) -> int:
        return self.heads // self.kv_heads


def read_dims(
    fields: Fields,
    *,
    rope: RopeSettings,
    default_kv_heads: int | None,
    default_head_dim: int | None,
    default_eps: float = 1e-6,
    attention_bias: bool = False,
) -> DecoderDims:
    """The common part of a config; ``None`` as a default means what the other sizes imply.

    ``attention_bias`` is the one value that the model can have, and its default.

    Raises:
        UnsupportedModelError: Missing or impossible sizes, and settings that TorchTitan's decoders do not
            have.
    """
    quantization.read(fields.hf, fields.architecture)
    fields.only("hidden_act", ("silu",))
    fields.only("attention_bias", (attention_bias,))
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", maximum=1 << 16)
    kv_heads = fields.integer("num_key_value_heads", default=default_kv_heads or heads)
    if fields.hf.get("head_dim") is None and default_head_dim is None and dim % heads:
        raise fields.refusal(
            "hidden_size", dim, f"a multiple of num_attention_heads={heads}, or head_dim stated"
        )
    head_dim = fields.integer("head_dim", default=default_head_dim or dim // heads, minimum=0)
    if heads % kv_heads:
        divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise fields.refusal(
            "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads: {', '.join(divisors)}"
        )
    if head_dim < 2 or head_dim % 2:
        raise fields.refusal("head_dim", head_dim, "an even number, which rotary positions need")
    return DecoderDims(
        vocab=fields.integer("vocab_size"),
        dim=dim,
        layers=fields.integer("num_hidden_layers", maximum=4096),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        head_dim_is_implied=head_dim * heads == dim,
        eps=fields.number("rms_norm_eps", default=default_eps),
        max_seq_len=fields.integer("max_position_embeddings"),
        tied=fields.flag("tie_word_embeddings"),
        init_std=fields.number("initializer_range", default=0.02),
        rope=rope,
    )


def vocab_view(name: str, fqn: str, dims: DecoderDims, padded_vocab: int | None) -> View:
    """The checkpoint's ``[V, D]`` rows of an embedding or head that may have more."""
    rows = padded_vocab or dims.vocab
    return View(
        name=name,
        fqn=fqn,
        shape=(dims.vocab, dims.dim),
        factors=((rows,), (dims.dim,)),
        index=((0, dims.vocab), (0, dims.dim)),
        permute=(0, 1),
    )


def root_views(dims: DecoderDims, padded_vocab: int | None) -> Iterator[View]:
    yield vocab_view("model.embed_tokens.weight", "tok_embeddings.weight", dims, padded_vocab)
    yield View.identity("model.norm.weight", "norm.weight", (dims.dim,))
    if not dims.tied:
        yield vocab_view("lm_head.weight", "lm_head.weight", dims, padded_vocab)


def norm_views(layer: int, dims: DecoderDims) -> Iterator[View]:
    hf, titan = f"model.layers.{layer}", f"layers.{layer}"
    yield View.identity(f"{hf}.input_layernorm.weight", f"{titan}.attention_norm.weight", (dims.dim,))
    yield View.identity(f"{hf}.post_attention_layernorm.weight", f"{titan}.ffn_norm.weight", (dims.dim,))


def ffn_views(
    layer: int, dims: DecoderDims, hidden_dim: int, *, hf: str = "mlp", titan: str = "feed_forward"
) -> Iterator[View]:
    """A gated feed-forward: by default a dense layer's."""
    hf, titan = f"model.layers.{layer}.{hf}", f"layers.{layer}.{titan}"
    yield View.identity(f"{hf}.gate_proj.weight", f"{titan}.w1.weight", (hidden_dim, dims.dim))
    yield View.identity(f"{hf}.up_proj.weight", f"{titan}.w3.weight", (hidden_dim, dims.dim))
    yield View.identity(f"{hf}.down_proj.weight", f"{titan}.w2.weight", (dims.dim, hidden_dim))


def expert_views(layer: int, dims: DecoderDims, experts: int, hidden_dim: int) -> Iterator[View]:
    """Router and routed experts of one layer; Hugging Face has a tensor for each expert's matrix."""
    hf, titan = f"model.layers.{layer}.mlp", f"layers.{layer}.moe"
    yield View.identity(f"{hf}.gate.weight", f"{titan}.router.gate.weight", (experts, dims.dim))
    wide, tall = (hidden_dim, dims.dim), (dims.dim, hidden_dim)
    for name, parameter, shape in (
        ("gate", "w1_EFD", wide),
        ("up", "w3_EFD", wide),
        ("down", "w2_EDF", tall),
    ):
        for expert in range(experts):
            yield View(
                name=f"{hf}.experts.{expert}.{name}_proj.weight",
                fqn=f"{titan}.routed_experts.inner_experts.{parameter}",
                shape=shape,
                factors=((experts,), (shape[0],), (shape[1],)),
                index=((expert, expert + 1), (0, shape[0]), (0, shape[1])),
                permute=(0, 1, 2),
            )


def attention_views(
    layer: int,
    dims: DecoderDims,
    *,
    qk_norm: bool,
    interleaved: bool,
    fused_qkv: bool,
    bias: bool = False,
) -> Iterator[View]:
    """Projections (and their biases) and head norms of one layer.

    ``interleaved``: TorchTitan rotates neighbours (2i, 2i+1) of a head where Hugging Face rotates (i, i +
    H/2), so that rows of q and k within a head are ``[H/2, 2]`` in the one and ``[2, H/2]`` in the other.
    """
    hf, titan = f"model.layers.{layer}.self_attn", f"layers.{layer}.attention"
    queries = dims.heads_per_kv
    for letter, heads, start in (("q", queries, 0), ("k", 1, queries), ("v", 1, queries + 1)):
        name, shape = f"{hf}.{letter}_proj", (dims.kv_heads * heads * dims.head_dim, dims.dim)
        halves = (dims.head_dim // 2, 2) if interleaved and letter != "v" else (dims.head_dim,)
        rows = (dims.kv_heads, queries + 2) if fused_qkv else (dims.kv_heads * heads,)
        factors = ((*rows, *halves), (dims.dim,))
        index = [(0, size) for dim in factors for size in dim]
        if fused_qkv:
            index[1] = (start, start + heads)
        order = list(range(len(index)))
        if len(halves) == 2:
            first = len(rows)
            order[first], order[first + 1] = first + 1, first
        fqn = f"{titan}.qkv_linear.{'wqkv' if fused_qkv else 'w' + letter}"
        yield View(
            name=f"{name}.weight",
            fqn=f"{fqn}.weight",
            shape=shape,
            factors=factors,
            index=tuple(index),
            permute=tuple(order),
        )
        if bias:
            yield View(
                name=f"{name}.bias",
                fqn=f"{fqn}.bias",
                shape=shape[:1],
                factors=factors[:1],
                index=tuple(index[:-1]),
                permute=tuple(order[:-1]),
            )
    if bias:
        yield View.identity(f"{hf}.o_proj.bias", f"{titan}.wo.bias", (dims.dim,))
    yield View.identity(f"{hf}.o_proj.weight", f"{titan}.wo.weight", (dims.dim, dims.heads * dims.head_dim))
    if qk_norm:
        for letter in "qk":
            yield View.identity(
                f"{hf}.{letter}_norm.weight", f"{titan}.{letter}_norm.weight", (dims.head_dim,)
            )


class DecoderFamily(Family):
    """A family whose config.json has the common fields, and whose head may be its embedding."""

    @abstractmethod
    def dims(self, hf: Mapping[str, Any]) -> DecoderDims:
        """The common fields."""

    def optional_views(self, hf: Mapping[str, Any], *, padded_vocab: int | None = None) -> tuple[View, ...]:
        dims = self.dims(hf)
        if not dims.tied:
            return ()
        return (vocab_view("lm_head.weight", "tok_embeddings.weight", dims, padded_vocab),)

    def tied_names(self, hf: Mapping[str, Any]) -> dict[str, str]:
        return {"lm_head.weight": "tok_embeddings.weight"} if self.dims(hf).tied else {}
