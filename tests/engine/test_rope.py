"""Serving's rotation has the bits of TorchTitan's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE

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
