"""What the families share: one reading of the common config fields, TorchTitan config parts and their views.

Dims: V vocabulary, D model, N query heads, n kv heads, H head; R = N/n + 2 is one kv head's queries, key and
value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torchtitan.models.common import Embedding, Linear, RMSNorm, RoPE
from torchtitan.models.common.attention import GQAttention
from torchtitan.models.common.config_utils import get_attention_config, make_ffn_config, make_gqa_config
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.param_init import skip_param_init

from titan_bridge.models import rope
from titan_bridge.models.fields import Fields
from titan_bridge.sharding.view import View

Init = dict[str, Callable[..., Any]]


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
    rope: rope.RopeSettings

    @property
    def heads_per_kv(self) -> int:
        return self.heads // self.kv_heads

    @property
    def weight_init(self) -> Init:
        return {"weight": partial(nn.init.normal_, std=self.init_std), "bias": nn.init.zeros_}


def read_dims(
    fields: Fields, *, rope_types: tuple[str, ...], default_kv_heads: int | None, default_head_dim: int | None
) -> DecoderDims:
    """The common part of a config; ``None`` as a default means what the other sizes imply.

    Raises:
        UnsupportedModelError: Missing or impossible sizes, and settings that TorchTitan's decoders do not
            have.
    """
    fields.only("quantization_config", ())
    fields.only("hidden_act", ("silu",))
    fields.only("attention_bias", (False,))
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
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
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        head_dim_is_implied=head_dim * heads == dim,
        eps=fields.number("rms_norm_eps", default=1e-6),
        max_seq_len=fields.integer("max_position_embeddings"),
        tied=fields.flag("tie_word_embeddings"),
        init_std=fields.number("initializer_range", default=0.02),
        rope=rope.read(fields, rope_types=rope_types),
    )


def norm_config(dim: int, eps: float) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=dim, eps=eps, param_init={"weight": nn.init.ones_})


def attention_config(dims: DecoderDims, kind: type[RoPE.Config], *, qk_norm: bool) -> GQAttention.Config:
    """Grouped-query attention with fused qkv; a head size that the others imply is left unset."""
    return make_gqa_config(
        dim=dims.dim,
        n_heads=dims.heads,
        n_kv_heads=dims.kv_heads,
        head_dim=None if dims.head_dim_is_implied and not qk_norm else dims.head_dim,
        wqkv_param_init=dims.weight_init,
        wo_param_init=dims.weight_init,
        inner_attention=get_attention_config("flex"),
        rope=dims.rope.config(kind, head_dim=dims.head_dim, max_seq_len=dims.max_seq_len),
        fuse_qkv=True,
        qk_norm=norm_config(dims.head_dim, dims.eps) if qk_norm else None,
    )


def ffn_config(dims: DecoderDims, hidden_dim: int) -> FeedForward.Config:
    return make_ffn_config(
        dim=dims.dim, hidden_dim=hidden_dim, w1_param_init=dims.weight_init, w2w3_param_init=dims.weight_init
    )


def root_fields(dims: DecoderDims, padded_vocab: int | None) -> dict[str, Any]:
    """Keyword arguments of a ``Decoder.Config`` but its layers.

    Raises:
        ValueError: ``padded_vocab`` is smaller than the checkpoint's vocabulary.
    """
    rows = dims.vocab if padded_vocab is None else padded_vocab
    if rows < dims.vocab:
        raise ValueError(
            f"padded_vocab={rows} is smaller than vocab_size={dims.vocab}; give at least that many rows"
        )
    embedding_init: Init = (
        {"weight": skip_param_init} if dims.tied else {"weight": dims.weight_init["weight"]}
    )
    return {
        "dim": dims.dim,
        "vocab_size": rows,
        "norm": norm_config(dims.dim, dims.eps),
        "tok_embeddings": Embedding.Config(
            num_embeddings=rows, embedding_dim=dims.dim, param_init=embedding_init
        ),
        "lm_head": Linear.Config(in_features=dims.dim, out_features=rows, param_init=dims.weight_init),
        "enable_weight_tying": dims.tied,
    }


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


def ffn_views(layer: int, dims: DecoderDims, hidden_dim: int) -> Iterator[View]:
    hf, titan = f"model.layers.{layer}.mlp", f"layers.{layer}.feed_forward"
    yield View.identity(f"{hf}.gate_proj.weight", f"{titan}.w1.weight", (hidden_dim, dims.dim))
    yield View.identity(f"{hf}.up_proj.weight", f"{titan}.w3.weight", (hidden_dim, dims.dim))
    yield View.identity(f"{hf}.down_proj.weight", f"{titan}.w2.weight", (dims.dim, hidden_dim))


def attention_views(
    layer: int, dims: DecoderDims, *, qk_norm: bool, interleaved: bool, fused_qkv: bool
) -> Iterator[View]:
    """Projections and head norms of one layer.

    ``interleaved``: TorchTitan rotates neighbours (2i, 2i+1) of a head where Hugging Face rotates (i, i +
    H/2), so that rows of q and k within a head are ``[H/2, 2]`` in the one and ``[2, H/2]`` in the other.
    """
    hf, titan = f"model.layers.{layer}.self_attn", f"layers.{layer}.attention"
    queries = dims.heads_per_kv
    for letter, heads, start in (("q", queries, 0), ("k", 1, queries), ("v", 1, queries + 1)):
        name, shape = f"{hf}.{letter}_proj.weight", (dims.kv_heads * heads * dims.head_dim, dims.dim)
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
        yield View(
            name=name,
            fqn=f"{titan}.qkv_linear.{'wqkv' if fused_qkv else 'w' + letter}.weight",
            shape=shape,
            factors=factors,
            index=tuple(index),
            permute=tuple(order),
        )
    yield View.identity(f"{hf}.o_proj.weight", f"{titan}.wo.weight", (dims.dim, dims.heads * dims.head_dim))
    if qk_norm:
        for letter in "qk":
            yield View.identity(
                f"{hf}.{letter}_norm.weight", f"{titan}.{letter}_norm.weight", (dims.head_dim,)
            )


def hf_root(config: Decoder.Config, *, architecture: str, model_type: str, dtype: str) -> dict[str, Any]:
    """The part of config.json that every decoder shares, from a TorchTitan config tree."""
    attention = config.layers[0].attention
    heads = attention.n_heads
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": dtype,
        # Older readers know the dtype by this name only.
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": heads,
        "num_key_value_heads": attention.n_kv_heads or heads,
        "head_dim": attention.head_dim or config.dim // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.norm.eps,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": rope.to_hf(attention.rope),
        "tie_word_embeddings": config.enable_weight_tying,
    }


def tied_head_views(dims: DecoderDims, padded_vocab: int | None) -> tuple[View, ...]:
    """A tied checkpoint may repeat the embedding as its head."""
    if not dims.tied:
        return ()
    return (vocab_view("lm_head.weight", "tok_embeddings.weight", dims, padded_vocab),)


def tied_names(dims: DecoderDims) -> dict[str, str]:
    return {"lm_head.weight": "tok_embeddings.weight"} if dims.tied else {}
