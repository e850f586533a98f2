"""Serving's rotation has the bits of TorchTitan's; uncompiled on a CPU it and norms are operators of vLLM's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE
from vllm.platforms import current_platform

from titan_bridge.engine.cpu.eager import (
    NormInOne,
    has_operators,
    norm_in_one,
    norm_rounds,
    rotate_in_one,
    table_for_operator,
)
from titan_bridge.engine.model.rope import cut_rows, rotate_by_halves, rotate_pairs

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "rotate"), [(CosSinRoPE, rotate_by_halves), (ComplexRoPE, rotate_pairs)])
def test_a_rotation_has_the_bits_of_torchtitan(kind: type, rotate: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rope = kind.Config(dim=48, max_seq_len=300).build()
    query, key = (torch.randn(1, 17, heads, 48).to(dtype) for heads in (6, 2))
    rows = rope._reshape_cache(query, torch.randint(300, (1, 17)))
    *_, cos, sin = cut_rows(rope, rows)
    ours, theirs = rotate(query, key, cos, sin), rope.apply_rotary_emb(query, key, rows)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], query)


@pytest.fixture
def operators() -> None:
    current_platform.import_kernels()
    assert has_operators(torch.bfloat16)
    assert not has_operators(torch.float32), "the referee has torch's own"


@pytest.mark.parametrize("heads", [(6, 2), (1, 1)])
@pytest.mark.usefixtures("operators")
def test_a_rotation_in_one_operator_rounds_as_torchtitan_does(heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rope = CosSinRoPE.Config(dim=48, max_seq_len=300).build()
    query, key = (
        torch.randn(1, 17, 9, 48).bfloat16()[:, :, :count] for count in heads
    )  # views of one product
    before = query.clone()
    positions = torch.tensor([0, 299, *torch.randint(300, (15,)).tolist()])
    ours = rotate_in_one(query, key, *table_for_operator(rope.cache, positions))
    exact = rope.apply_rotary_emb(query.float(), key.float(), rope._reshape_cache(query, positions[None]))
    for mine, right in zip(ours, exact, strict=True):
        # float32 may differ in its last bits where sums are fused, and then round to the next bfloat16.
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), right.bfloat16().float(), rtol=2**-7, atol=1e-6)
        assert (mine != right.bfloat16()).float().mean() < 0.01
    assert torch.equal(query, before), "written in place"


@pytest.mark.parametrize("shape", [(1, 17, 512), (1, 17, 6, 48), (1, 0, 64)])
@pytest.mark.usefixtures("operators")
def test_a_norm_rounds_as_torch_does(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1]).bfloat16()[..., : shape[-1]]
    norm = RMSNorm.Config(normalized_shape=shape[-1], eps=1e-3).build().bfloat16()
    norm.weight.data.normal_()
    theirs = norm(x)
    norm_in_one(norm)
    assert type(norm) is (NormInOne if norm_rounds() else RMSNorm)
    ours = norm(x)
    assert ours.shape == x.shape
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)
    assert ours.numel() == 0 or (ours != theirs).float().mean() < 0.01
    exact = norm.float()(x.float())  # float32 has torch's own
    assert torch.equal(exact, torch.nn.functional.rms_norm(x.float(), x.shape[-1:], norm.weight, 1e-3))
