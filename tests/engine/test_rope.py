"""Serving's rotation has the bits of TorchTitan's."""

from __future__ import annotations

import pytest
import torch
from torchtitan.models.common.rope import CosSinRoPE

from titan_bridge.engine.model.rope import cut_rows, rotate_by_halves

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_by_halves_has_the_bits_of_torchtitan(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rope = CosSinRoPE.Config(dim=48, max_seq_len=300).build()
    query, key = (torch.randn(1, 17, heads, 48).to(dtype) for heads in (6, 2))
    rows = rope._reshape_cache(query, torch.randint(300, (1, 17)))
    ours, theirs = (
        rotate_by_halves(query, key, *cut_rows(rope, rows)),
        rope.apply_rotary_emb(query, key, rows),
    )
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], query)
