"""Windows cut by `strided_copies` against plain indexing of the whole tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from titan_bridge.sharding.boxes import pieces_of
from titan_bridge.sharding.strided import factored, strided_copies
from titan_bridge.sharding.view import View


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_factored_boxes_are_the_interval(factors: list[int], data: st.DataObject) -> None:
    size = torch.Size(factors).numel()
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = torch.arange(size).reshape(factors)
    found = [numbers[tuple(slice(a, b) for a, b in box)].flatten() for box in factored(start, stop, factors)]
    assert torch.cat([torch.arange(0), *found]).tolist() == list(range(start, stop))


VIEWS = {
    "q of fused qkv": dict(shape=(24, 6), factors=((2, 5, 4), (6,)), index=((0, 2), (0, 3), (0, 4), (0, 6))),
    "rotary halves": dict(
        shape=(24, 6), factors=((2, 5, 2, 2), (6,)), index=((0, 2), (0, 3), (0, 2), (0, 2), (0, 6)),
        permute=(0, 1, 3, 2, 4),
    ),
    "one expert": dict(shape=(6, 5), factors=((4,), (6,), (5,)), index=((2, 3), (0, 6), (0, 5))),
    "vocabulary without padding": dict(shape=(7, 4), factors=((8,), (4,)), index=((0, 7), (0, 4))),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranks_put_together_hold_the_external_tensor(name: str, data: st.DataObject) -> None:
    view = View(name=name, fqn=name, **VIEWS[name])
    external = torch.randn(view.shape)
    whole = torch.zeros(view.titan_shape)
    view.write(whole, external)
    mesh = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    dims = st.integers(0, len(view.titan_shape) - 1)
    kinds = st.one_of(
        st.just(Replicate()), dims.map(Shard),
        st.tuples(dims, st.integers(1, 3)).map(lambda pair: _StridedShard(pair[0], split_factor=pair[1])),
    )  # fmt: skip
    placements = tuple(data.draw(kinds) for _ in mesh)
    for coordinate in itertools.product(*map(range, mesh)):
        pieces = pieces_of(placements, view.titan_shape, mesh, coordinate)
        shape = torch.Size(max((p.local.stop[d] for p in pieces), default=0) for d in range(whole.ndim))
        local = torch.zeros(shape)
        for mine, theirs in strided_copies(view, pieces, local.stride(), external.stride()):
            local.as_strided(*mine).copy_(external.as_strided(*theirs))
        for piece in pieces:
            assert torch.equal(local[piece.local.slices], whole[piece.box.slices])
