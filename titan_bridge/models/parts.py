"""Parts of TorchTitan's config trees that the families share, from a config.json that was read.

The only module here that the families take from TorchTitan's side: importing TorchTitan takes two seconds, and what
only names and cuts tensors does without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torchtitan.models.common import Embedding, Linear, RMSNorm, RoPE
from torchtitan.models.common.attention import FlexAttention, GQAttention, VarlenAttention
from torchtitan.models.common.config_utils import (
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.protocols.module import Module

from titan_bridge.device import use_cpu_if_no_accelerator
from titan_bridge.models import rope
from titan_bridge.models.adapters import inner_attention
from titan_bridge.models.decoder import DecoderDims

Init = dict[str, Callable[..., Any]]
LOAD_BALANCE_COEFF = 1e-3
"""TorchTitan's default; a router that has one has an expert bias, which training moves by it."""

# Every road to a config tree leads through here, and whatever of TorchTitan is imported later copies the name.
use_cpu_if_no_accelerator()


def linear_init(dims: DecoderDims) -> Init:
    return {"weight": partial(nn.init.normal_, std=dims.init_std), "bias": nn.init.zeros_}


def norm_config(dim: int, eps: float) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=dim, eps=eps, param_init={"weight": nn.init.ones_})


def norm_fields(dims: DecoderDims) -> dict[str, RMSNorm.Config]:
    """Keyword arguments of a block's config: its two norms."""
    return {name: norm_config(dims.dim, dims.eps) for name in ("attention_norm", "ffn_norm")}


def inner_attention_configs(windows: Sequence[int | None]) -> list[Module.Config]:
    """Inner attention of each layer. Varlen states a window in its config; flex, in masks that the model makes."""
    if not any(windows):
        return [FlexAttention.Config() for _ in windows]
    return [VarlenAttention.Config(window_size=(window - 1 if window else -1, 0)) for window in windows]


def attention_config(
    dims: DecoderDims, kind: type[RoPE.Config], *, qk_norm: bool, inner: Module.Config
) -> GQAttention.Config:
    """Grouped-query attention with fused qkv; a head size that the others imply is left unset."""
    return make_gqa_config(
        dim=dims.dim,
        n_heads=dims.heads,
        n_kv_heads=dims.kv_heads,
        head_dim=None if dims.head_dim_is_implied and not qk_norm else dims.head_dim,
        wqkv_param_init=linear_init(dims),
        wo_param_init=linear_init(dims),
        inner_attention=inner,
        rope=dims.rope.config(kind, head_dim=dims.head_dim, max_seq_len=dims.max_seq_len),
        fuse_qkv=True,
        qk_norm=norm_config(dims.head_dim, dims.eps) if qk_norm else None,
    )


def ffn_config(dims: DecoderDims, hidden_dim: int) -> FeedForward.Config:
    return make_ffn_config(
        dim=dims.dim,
        hidden_dim=hidden_dim,
        w1_param_init=linear_init(dims),
        w2w3_param_init=linear_init(dims),
    )


def moe_config(
    dims: DecoderDims,
    *,
    experts: int,
    hidden_dim: int,
    top_k: int,
    expert_bias: bool,
    shared: FeedForward.Config | None = None,
    **router: Any,
) -> MoE.Config:
    """``hidden_dim`` is one routed expert's; ``router`` are settings of TorchTitan's router."""
    normal = partial(nn.init.normal_, std=dims.init_std)
    return make_moe_config(
        num_experts=experts,
        router=make_router_config(
            dim=dims.dim,
            num_experts=experts,
            gate_param_init=linear_init(dims),
            top_k=top_k,
            **router,
        ),
        routed_experts=make_routed_experts_config(
            dim=dims.dim,
            hidden_dim=hidden_dim,
            num_experts=experts,
            top_k=top_k,
            param_init={"w1_EFD": normal, "w2_EDF": normal, "w3_EFD": normal},
            comm_backend="standard",
        ),
        shared_experts=shared,
        load_balance_coeff=LOAD_BALANCE_COEFF if expert_bias else None,
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
        {"weight": skip_param_init} if dims.tied else {"weight": linear_init(dims)["weight"]}
    )
    return {
        "dim": dims.dim,
        "vocab_size": rows,
        "norm": norm_config(dims.dim, dims.eps),
        "tok_embeddings": Embedding.Config(
            num_embeddings=rows, embedding_dim=dims.dim, param_init=embedding_init
        ),
        "lm_head": Linear.Config(in_features=dims.dim, out_features=rows, param_init=linear_init(dims)),
        "enable_weight_tying": dims.tied,
    }


def hf_root(config: Decoder.Config, *, architecture: str, model_type: str, dtype: str) -> dict[str, Any]:
    """The part of config.json that every decoder shares, from a TorchTitan config tree."""
    attention = config.layers[0].attention
    inner = inner_attention(attention)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": dtype,
        # Older readers know the dtype by this name only.
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": inner.n_heads,
        "num_key_value_heads": inner.n_kv_heads,
        "head_dim": inner.qk_head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.norm.eps,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": rope.to_hf(attention.rope),
        "tie_word_embeddings": config.enable_weight_tying,
    }
