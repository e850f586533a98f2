"""Routed experts that keep their dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

from titan_bridge.device_meshes import to_parallel_dims
from titan_bridge.mesh import Sizes
from titan_bridge.models import family_for
from titan_bridge.models.adapters import keep_expert_dtype
from titan_bridge.models.experts import KeepDtypeGroupedExperts
from titan_bridge.models.gpt_oss_experts import KeepDtypeGptOssExperts

COUNTS = torch.tensor([3, 0, 5, 2])
HF = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [0],
}


def experts(
    kind: type[GroupedExperts], dtype: torch.dtype, *, dim: int = 32, hidden_dim: int = 16, **settings: float
) -> GroupedExperts:
    made = kind(kind.Config(dim=dim, hidden_dim=hidden_dim, num_experts=4, **settings)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(std=0.3, generator=generator))
    return made.requires_grad_(False)


def expert_by_expert(made: GroupedExperts, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU of each expert on its rows, in float64."""
    if isinstance(made, GptOssGroupedExperts):
        return gpt_oss_expert_by_expert(made, x)
    w1, w2, w3, rows = (tensor.double() for tensor in (made.w1_EFD, made.w2_EDF, made.w3_EFD, x))
    parts = rows.split(COUNTS.tolist())
    return torch.cat([(F.silu(part @ w1[e].T) * (part @ w3[e].T)) @ w2[e].T for e, part in enumerate(parts)])


def gpt_oss_expert_by_expert(made: GptOssGroupedExperts, x: torch.Tensor) -> torch.Tensor:
    w1, b1, w2, b2 = (
        p.double() for p in (made.mlp1_weight_EGD, made.mlp1_bias_EG, made.mlp2_weight_EDF, made.mlp2_bias_ED)
    )
    out = []
    for e, part in enumerate(x.double().split(COUNTS.tolist())):
        both = part @ w1[e].T + b1[e]
        gate, up = (
            both[:, ::2].clamp(max=made.swiglu_limit),
            both[:, 1::2].clamp(-made.swiglu_limit, made.swiglu_limit),
        )
        out.append((up + 1) * gate * torch.sigmoid(1.702 * gate) @ w2[e].T + b2[e])
    return torch.cat(out)


VARIANTS = [(KeepDtypeGroupedExperts, GroupedExperts), (KeepDtypeGptOssExperts, GptOssGroupedExperts)]


@pytest.mark.parametrize("kind", [ours for ours, _ in VARIANTS])
@pytest.mark.parametrize(("dim", "hidden_dim"), [(32, 16), (30, 16), (32, 15), (29, 13)])
def test_float32_experts_compute_in_float32(kind: type[GroupedExperts], dim: int, hidden_dim: int) -> None:
    limit = {"swiglu_limit": 1.0} if kind is KeepDtypeGptOssExperts else {}
    made = experts(kind, torch.float32, dim=dim, hidden_dim=hidden_dim, **limit)
    x = torch.randn(10, dim, generator=torch.Generator().manual_seed(1))
    out = made(x, COUNTS)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expert_by_expert(made, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [theirs for _, theirs in VARIANTS])
def test_torchtitans_own_experts_round_float32_to_bfloat16(kind: type[GroupedExperts]) -> None:
    # The reason for the variant; when this fails, it can go.
    made = experts(kind, torch.float32)
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    assert (made(x, COUNTS).double() - expert_by_expert(made, x)).abs().max() > 1e-3


@pytest.mark.parametrize("kinds", VARIANTS)
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_experts_are_torchtitans_bit_for_bit(
    kinds: tuple[type[GroupedExperts], ...], input_dtype: torch.dtype
) -> None:
    ours, theirs = (experts(kind, torch.bfloat16) for kind in kinds)
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(1)).to(input_dtype)
    out = ours(x, COUNTS)
    assert out.dtype == input_dtype
    assert torch.equal(out, theirs(x, COUNTS).to(input_dtype))


@pytest.mark.parametrize("kind", [ours for ours, _ in VARIANTS])
def test_bfloat16_experts_of_odd_sizes_are_computed_too(kind: type[GroupedExperts]) -> None:
    made = experts(kind, torch.bfloat16, dim=30, hidden_dim=13)
    x = torch.randn(10, 30, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    out = made(x, COUNTS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expert_by_expert(made, x), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("kind", [ours for ours, _ in VARIANTS])
def test_no_tokens_are_no_output(kind: type[GroupedExperts]) -> None:
    for dim in (32, 30):
        made = experts(kind, torch.float32, dim=dim)
        assert made(torch.empty(0, dim), torch.zeros(4, dtype=torch.int64)).shape == (0, dim)


@pytest.mark.parametrize("sizes", [Sizes(tp=2), Sizes(tp=2, ep=2)])
def test_the_second_bias_counts_once(sizes: Sizes) -> None:
    made = experts(KeepDtypeGptOssExperts, torch.float32)
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    whole, total = made(x, COUNTS), torch.zeros(10, 32)
    for rank in range(2):
        part = experts(KeepDtypeGptOssExperts, torch.float32)
        part.parallelize(to_parallel_dims(sizes))
        if sizes.ep == 1:  # every rank has a slice of every expert, and the outputs are added up
            for name, dim in (("mlp1_weight_EGD", 1), ("mlp1_bias_EG", 1), ("mlp2_weight_EDF", 2)):
                local = getattr(made, name).chunk(2, dim)[rank].contiguous()
                setattr(part, name, torch.nn.Parameter(local, requires_grad=False))
            total += part(x, COUNTS)
        else:  # every rank has whole experts, here all of them
            total += part(x, COUNTS) / 2
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


def test_the_variant_is_swapped_in_for_every_sparse_layer_and_keeps_its_settings() -> None:
    config = family_for(HF).model_config(HF)
    before = config.layers[1].moe.routed_experts.inner_experts
    keep_expert_dtype(config)
    keep_expert_dtype(config)
    after = config.layers[1].moe.routed_experts.inner_experts
    assert config.layers[0].moe is None
    assert type(after) is KeepDtypeGroupedExperts.Config
    assert (after.dim, after.hidden_dim, after.num_experts) == (
        before.dim,
        before.hidden_dim,
        before.num_experts,
    )
    assert after.param_init is before.param_init
    with torch.device("meta"):
        assert type(config.build().layers["1"].moe.routed_experts.inner_experts) is KeepDtypeGroupedExperts
