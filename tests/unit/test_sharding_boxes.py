"""Boxes are equal to torch's own sharding, disjoint up to replicas, and cover the tensor."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from tests.unit.sharding_samples import boxes_of
from titan_bridge.errors import BridgeError
from titan_bridge.sharding import Box, local_shape_of, pieces_of
from titan_bridge.sharding import boxes as module
from titan_bridge.sharding.boxes import factored, fsdp_is_exact


@st.composite
def shardings(draw, max_ranks=64, max_size=13):
    """(placements, global shape, mesh shape): up to 4 dims and 4 axes, uneven, with several axes on one
    dim."""
    shape = tuple(draw(st.lists(st.integers(1, max_size), min_size=0, max_size=4)))
    mesh, left = [], max_ranks
    for _ in range(draw(st.integers(1, 4))):
        mesh.append(draw(st.integers(1, min(left, 8))))
        left //= mesh[-1]
    choices = [st.just(Replicate())]
    if shape:
        dims = st.integers(0, len(shape) - 1)
        choices += [
            dims.map(Shard),
            st.builds(lambda d, f: _StridedShard(d, split_factor=f), dims, st.integers(1, 5)),
        ]
    placements = tuple(draw(st.one_of(choices)) for _ in mesh)
    return placements, shape, tuple(mesh)


def torch_local(tensor: torch.Tensor, placements, mesh_shape, coordinate) -> torch.Tensor:
    """The oracle: each placement cuts, from left to right, with torch's own `_split_tensor`."""
    for placement, size, index in zip(placements, mesh_shape, coordinate, strict=True):
        if not isinstance(placement, Replicate):
            tensor = placement._split_tensor(tensor, size, with_padding=False)[0][index]
    return tensor


def coordinates(mesh_shape):
    return itertools.product(*(range(size) for size in mesh_shape))


@settings(max_examples=300, deadline=None)
@given(shardings())
def test_every_local_tensor_is_made_of_its_boxes(sharding):
    placements, shape, mesh_shape = sharding
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    for coordinate in coordinates(mesh_shape):
        expected = torch_local(tensor, placements, mesh_shape, coordinate)
        local = torch.full(local_shape_of(placements, shape, mesh_shape, coordinate), -1)
        for piece in pieces_of(placements, shape, mesh_shape, coordinate):
            assert (local[piece.local.slices] == -1).all()
            local[piece.local.slices] = tensor[piece.box.slices]
        assert local.shape == expected.shape
        assert torch.equal(local, expected)


@settings(max_examples=200, deadline=None)
@given(shardings())
def test_boxes_are_disjoint_up_to_replicas_and_cover(sharding):
    placements, shape, mesh_shape = sharding
    held = {boxes_of(placements, shape, mesh_shape, coordinate) for coordinate in coordinates(mesh_shape)}
    count = torch.zeros(shape, dtype=torch.int64)
    for boxes in held:
        for box in boxes:
            count[box.slices] += 1
    assert (count == 1).all()


@settings(max_examples=200, deadline=None)
@given(shardings())
def test_shape_and_offset_equal_dtensor_metadata(sharding):
    placements, shape, mesh_shape = sharding
    for coordinate in coordinates(mesh_shape):
        local_shape, offset = _compute_local_shape_and_global_offset(
            shape, mesh_shape, list(coordinate), placements
        )
        assert local_shape_of(placements, shape, mesh_shape, coordinate) == tuple(local_shape)
        boxes = boxes_of(placements, shape, mesh_shape, coordinate)
        if boxes:
            assert boxes[0].start == tuple(offset)


@settings(max_examples=200, deadline=None)
@given(shardings())
def test_neighbouring_boxes_are_merged(sharding):
    """No two boxes of a rank touch both in the global and in the local tensor: they would be one."""
    placements, shape, mesh_shape = sharding
    for coordinate in coordinates(mesh_shape):
        pieces = pieces_of(placements, shape, mesh_shape, coordinate)
        for a, b in itertools.permutations(pieces, 2):
            different = [d for d in range(len(shape)) if a.box.start[d] != b.box.start[d]]
            if len(different) == 1:
                d = different[0]
                assert not (a.box.stop[d] == b.box.start[d] and a.local.stop[d] == b.local.start[d])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6))
def test_where_fully_shard_leaves_what_it_says(size, tp, fsdp):
    """Against torch's own splits: first over tp, then over fsdp, as `fully_shard` does."""
    rows, exact = torch.arange(size), True
    for right, shard in enumerate(Shard(0)._split_tensor(rows, tp, with_padding=False)[0]):
        for left, real in enumerate(Shard(0)._split_tensor(shard, fsdp, with_padding=False)[0]):
            said = torch_local(rows, (_StridedShard(0, split_factor=tp), Shard(0)), (fsdp, tp), (left, right))
            exact &= torch.equal(real, said)
    assert fsdp_is_exact(size, tp, fsdp) == exact
    assert exact or size % (tp * fsdp)


def test_an_uneven_case_that_fully_shard_gets_wrong():
    assert not fsdp_is_exact(9, 2, 4)
    assert fsdp_is_exact(9, 2, 2)


def test_fsdp_over_tp_on_one_dim():
    """8 rows on (fsdp=2, tp=2) as torch's docstring of _StridedShard has them."""
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    rows = {c: boxes_of(placements, (8,), (2, 2), c) for c in coordinates((2, 2))}
    assert rows == {
        (0, 0): (Box(start=(0,), stop=(2,)),),
        (0, 1): (Box(start=(4,), stop=(6,)),),
        (1, 0): (Box(start=(2,), stop=(4,)),),
        (1, 1): (Box(start=(6,), stop=(8,)),),
    }


def test_strided_alone_is_several_boxes_side_by_side():
    pieces = pieces_of((_StridedShard(0, split_factor=3),), (12, 2), (2,), (1,))
    assert [piece.box.start[0] for piece in pieces] == [2, 6, 10]
    assert [piece.local.start[0] for piece in pieces] == [0, 2, 4]


def test_a_rank_without_rows_has_no_box_but_a_local_shape():
    assert boxes_of((Shard(0),), (3, 5), (4,), (3,)) == ()
    assert local_shape_of((Shard(0),), (3, 5), (4,), (3,)) == (0, 5)


@pytest.mark.parametrize(
    ("placements", "shape", "mesh", "coordinate", "says"),
    [
        ((Shard(0),), (4,), (2, 2), (0, 0), "1 placements for a mesh with 2 axes"),
        ((Shard(2),), (4, 4), (2,), (0,), "allowed: 0 to 1"),
        ((Partial(),), (4,), (2,), (0,), "a parameter can be R"),
        ((Shard(0),), (4,), (2,), (2,), "is not on a mesh"),
    ],
)
def test_what_does_not_fit_is_refused(placements, shape, mesh, coordinate, says):
    with pytest.raises(BridgeError, match=says):
        boxes_of(placements, shape, mesh, coordinate)


def test_box_arithmetic():
    a, b = Box(start=(0, 2), stop=(4, 6)), Box(start=(2, 0), stop=(8, 3))
    assert a.intersect(b) == Box(start=(2, 2), stop=(4, 3))
    assert a.intersect(Box(start=(4, 2), stop=(5, 6))) is None
    assert a.contains(Box(start=(1, 2), stop=(4, 3)))
    assert not a.contains(b)
    assert b.relative_to((2, 0)).start == (0, 0)
    assert a.numel == 16
    assert Box.whole(()).numel == 1


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_factored_boxes_are_the_interval(factors: list[int], data: st.DataObject) -> None:
    size = torch.Size(factors).numel()
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = torch.arange(size).reshape(factors)
    found = [numbers[tuple(slice(a, b) for a, b in box)].flatten() for box in factored(start, stop, factors)]
    assert torch.cat([torch.arange(0), *found]).tolist() == list(range(start, stop))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(0, 3), st.sampled_from([1, 7, 4_000_000]))
def test_boxes_that_meet_are_those_with_an_element_in_common(data, dims, block):
    """Oracle: every pair, intersected. Small blocks, so that pairs are looked at in several turns."""
    ends = st.tuples(st.integers(0, 9), st.integers(1, 4)).map(lambda span: (span[0], sum(span)))
    lists = [data.draw(st.lists(st.tuples(*[ends] * dims), max_size=12)) for _ in range(2)]
    boxes = [
        [Box(start=tuple(a for a, _ in box), stop=tuple(b for _, b in box)) for box in one] for one in lists
    ]
    arrays = [
        tuple(
            np.array([getattr(box, end) for box in one], dtype=np.int64).reshape(len(one), dims)
            for end in ("start", "stop")
        )
        for one in boxes
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        found = sorted(zip(*(index.tolist() for index in module.meeting(*arrays)), strict=True))
    expected = [
        (i, j) for i, a in enumerate(boxes[0]) for j, b in enumerate(boxes[1]) if a.intersect(b) is not None
    ]
    assert found == expected


def test_columns_that_meet_are_found_in_one_sweep():
    """20,000 columns of one row each: every pair would take minutes and 400 MB of memory."""
    columns = np.arange(20_000, dtype=np.int64)
    start = np.column_stack([np.zeros_like(columns), columns])
    i, j = module.meeting((start, start + 1), (start, start + 1))
    assert (i == j).all()
    assert len(i) == len(columns)
