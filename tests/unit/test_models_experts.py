"""Routed experts that keep their dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchtitan.models.common.moe import GroupedExperts

from titan_bridge.models import family_for
from titan_bridge.models.adapters import keep_expert_dtype
from titan_bridge.models.experts import KeepDtypeGroupedExperts

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
    kind: type[GroupedExperts], dtype: torch.dtype, *, dim: int = 32, hidden_dim: int = 16
) -> GroupedExperts:
    made = kind(kind.Config(dim=dim, hidden_dim=hidden_dim, num_experts=4)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(std=0.3, generator=generator))
    return made.requires_grad_(False)


def expert_by_expert(made: GroupedExperts, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU of each expert on its rows, in float64."""
    w1, w2, w3, rows = (tensor.double() for tensor in (made.w1_EFD, made.w2_EDF, made.w3_EFD, x))
    parts = rows.split(COUNTS.tolist())
    return torch.cat([(F.silu(part @ w1[e].T) * (part @ w3[e].T)) @ w2[e].T for e, part in enumerate(parts)])


@pytest.mark.parametrize(("dim", "hidden_dim"), [(32, 16), (30, 16), (32, 15), (29, 13)])
def test_float32_experts_compute_in_float32(dim: int, hidden_dim: int) -> None:
    made = experts(KeepDtypeGroupedExperts, torch.float32, dim=dim, hidden_dim=hidden_dim)
    x = torch.randn(10, dim, generator=torch.Generator().manual_seed(1))
    out = made(x, COUNTS)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expert_by_expert(made, x), rtol=1e-5, atol=1e-5)


def test_torchtitans_own_experts_round_float32_to_bfloat16() -> None:
    # The reason for the variant; when this fails, it can go.
    made = experts(GroupedExperts, torch.float32)
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    assert (made(x, COUNTS).double() - expert_by_expert(made, x)).abs().max() > 1e-3


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_experts_are_torchtitans_bit_for_bit(input_dtype: torch.dtype) -> None:
    ours, theirs = (experts(kind, torch.bfloat16) for kind in (KeepDtypeGroupedExperts, GroupedExperts))
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(1)).to(input_dtype)
    assert torch.equal(ours(x, COUNTS), theirs(x, COUNTS))


def test_bfloat16_experts_of_odd_sizes_are_computed_too() -> None:
    made = experts(KeepDtypeGroupedExperts, torch.bfloat16, dim=30, hidden_dim=13)
    x = torch.randn(10, 30, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    out = made(x, COUNTS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expert_by_expert(made, x), rtol=3e-2, atol=3e-2)


def test_no_tokens_are_no_output() -> None:
    for dim in (32, 30):
        made = experts(KeepDtypeGroupedExperts, torch.float32, dim=dim)
        assert made(torch.empty(0, dim), torch.zeros(4, dtype=torch.int64)).shape == (0, dim)


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
