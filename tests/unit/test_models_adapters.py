"""Adapters are found by the class of a config, wherever it stands in the tree, and drop nothing in silence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torchtitan.models.common.attention import GQAttention, ScaledDotProductAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.moe import GroupedExperts

from tests.unit.test_models_experts import HF
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes, check_divides
from titan_bridge.models import family_for
from titan_bridge.models.adapters import adapted, keep_expert_dtype, use_plain_attention
from titan_bridge.models.attention import PlainAttention
from titan_bridge.models.experts import KeepDtypeGroupedExperts


class Renamed(GroupedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass


class Computing(GroupedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        return x_RD


class Clamped(GroupedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        limit: float = 7.0


class Sparse(GQAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        keep: int = 4


def config_with(experts: type[GroupedExperts] = GroupedExperts) -> Decoder.Config:
    config = family_for(HF).model_config(HF)
    config.layers[1].moe.routed_experts.inner_experts = experts.Config(dim=32, hidden_dim=16, num_experts=4)
    return config


def test_every_adapted_module_of_a_tree_is_found() -> None:
    names = [one.fqn for one in adapted(config_with())]
    assert names == [
        "layers.0.attention",
        "layers.0.feed_forward",
        "layers.1.attention",
        "layers.1.moe.routed_experts.inner_experts",
    ]


def test_a_subclass_that_adds_nothing_shares_the_adapter() -> None:
    config = config_with(Renamed)
    keep_expert_dtype(config)
    assert type(config.layers[1].moe.routed_experts.inner_experts) is KeepDtypeGroupedExperts.Config


@pytest.mark.parametrize("experts", [Computing, Clamped])
def test_experts_that_an_adapter_would_drop_are_refused_by_name(experts: type[GroupedExperts]) -> None:
    config = config_with(experts)
    message = (
        rf"^layers\.1\.moe\.routed_experts\.inner_experts: .*\.{experts.__name__}\.Config adds to "
        r"GroupedExperts\.Config, whose adapter would drop it; give it one in Family\.adapters\(\)$"
    )
    for use in (keep_expert_dtype, use_plain_attention, lambda c: check_divides(c, Sizes())):
        with pytest.raises(BridgeError, match=message):
            use(config)


def test_attention_without_an_adapter_is_refused_by_name() -> None:
    config = config_with()
    plain = config.layers[0].attention
    stated = {
        name: getattr(plain, name)
        for name in ("n_heads", "dim", "qkv_linear", "wo", "inner_attention", "rope")
    }
    config.layers[0].attention = Sparse.Config(**stated)
    with pytest.raises(
        BridgeError, match=r"^layers\.0\.attention: .*\.Sparse\.Config adds to GQAttention\.Config"
    ):
        check_divides(config, Sizes())


def test_plain_attention_stands_in_every_layer_and_keeps_the_windows() -> None:
    hf: dict[str, Any] = HF | {"use_sliding_window": True, "sliding_window": 5}
    config = family_for(hf).model_config(hf)
    for _ in range(2):
        use_plain_attention(config)
        inner = [layer.attention.inner_attention for layer in config.layers]
        assert inner == [PlainAttention.Config(window=5)] * 2
    assert inner[0] is not inner[1]


def qkv(heads: int = 4, kv_heads: int = 4, v_dim: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 9, n, h, generator=generator)
        for n, h in ((heads, 8), (kv_heads, 8), (kv_heads, v_dim))
    ]


def softmax_over(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int, sinks: torch.Tensor
):
    """One query at a time in float64; a sink is a further key with a value of zero."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for at in range(q.shape[1]):
            for n in range(q.shape[2]):
                seen = slice(max(0, at - window + 1), at + 1)
                scores = k[b, seen, n // group].double() @ q[b, at, n].double() * scale
                weights = torch.cat([scores, sinks[n : n + 1].double()]).softmax(0)[:-1]
                out[b, at, n] = weights @ v[b, seen, n // group].double()
    return out


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(("kv_heads", "v_dim"), [(4, 8), (2, 8), (4, 6), (2, 12)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_plain_attention_is_softmax_over_what_a_query_sees(
    window: int | None, kv_heads: int, v_dim: int, with_sinks: bool
) -> None:
    q, k, v = qkv(kv_heads=kv_heads, v_dim=v_dim)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else torch.full((4,), float("-inf"))
    attend = PlainAttention(PlainAttention.Config(window=window))
    transform = (lambda out, lse: out * torch.sigmoid(lse - sinks).unsqueeze(-1)) if with_sinks else None
    out = attend(q, k, v, scale=0.7, enable_gqa=kv_heads != 4, out_transform=transform)
    expected = softmax_over(q, k, v, scale=0.7, window=window or 9, sinks=sinks)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_plain_attention_is_torchtitans_sdpa_where_that_can_compute_it() -> None:
    q, k, v = qkv(kv_heads=2)
    ours, theirs = (
        PlainAttention(PlainAttention.Config()),
        ScaledDotProductAttention(ScaledDotProductAttention.Config()),
    )
    for scale in (None, 0.3):
        assert torch.equal(
            ours(q, k, v, scale=scale, enable_gqa=True), theirs(q, k, v, scale=scale, enable_gqa=True)
        )


def test_plain_attention_swallows_no_keyword() -> None:
    attend = PlainAttention(PlainAttention.Config())
    with pytest.raises(TypeError, match="unexpected keyword argument 'score_mod'"):
        attend(*qkv(), score_mod=None)
    with pytest.raises(ValueError, match="takes no attention_masks"):
        attend(*qkv(), attention_masks=torch.ones(9, 9))
