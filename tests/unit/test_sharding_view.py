"""A view reads and writes exactly its slice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_bridge.errors import BridgeError
from titan_bridge.sharding import View


@st.composite
def views(draw, max_dims=3, max_factor=4, name="external", fqn="titan"):
    """Any view: each dim factored in one to three, any slice, any order, neighbours joined at random."""
    factors = tuple(
        tuple(draw(st.lists(st.integers(1, max_factor), min_size=1, max_size=3)))
        for _ in range(draw(st.integers(1, max_dims)))
    )
    flat = [size for dim in factors for size in dim]
    index = []
    for size in flat:
        start = draw(st.integers(0, size - 1))
        index.append((start, draw(st.integers(start + 1, size))))
    permute = tuple(draw(st.permutations(range(len(flat)))))
    shape = [1]
    for dim in permute:
        size = index[dim][1] - index[dim][0]
        if draw(st.booleans()):
            shape[-1] *= size
        else:
            shape.append(size)
    return View(name=name, fqn=fqn, shape=tuple(shape), factors=factors, index=tuple(index), permute=permute)


@settings(max_examples=200, deadline=None)
@given(views())
def test_write_then_read_and_nothing_else_changes(view):
    titan = torch.arange(math.prod(view.titan_shape), dtype=torch.int64).reshape(view.titan_shape)
    before, external = titan.clone(), -1 - torch.arange(math.prod(view.shape)).reshape(view.shape)
    view.write(titan, external)
    assert torch.equal(view.read(titan), external)
    assert int((titan != before).sum()) == external.numel()


@settings(max_examples=200, deadline=None)
@given(views(), st.data())
def test_rows_are_written_as_the_whole_is(view, data):
    whole = torch.zeros(view.titan_shape, dtype=torch.int64)
    external = 1 + torch.arange(math.prod(view.shape)).reshape(view.shape)
    view.write(whole, external)
    step = view.rows * data.draw(st.integers(1, view.factors[0][0]))
    for first in range(0, len(whole), step):
        part = torch.zeros_like(whole[first : first + step])
        view.write(part, external, first=first)
        assert torch.equal(part, whole[first : first + step])
        alone, box = torch.zeros_like(part), view.part(first, len(part))
        if box is not None:
            view.write(alone, external[box.slices], first=first)
        assert torch.equal(alone, part)


def test_the_part_that_rows_need_is_no_larger_than_they_are():
    dims, experts = {"name": "a", "fqn": "b"}, ((4,), (6,), (8,))
    query = View(**dims, shape=(24, 8), factors=((4, 3, 3), (8,)), index=((0, 4), (0, 2), (0, 3), (0, 8)))
    assert str(query.part(9, 18)) == "[6:18, 0:8]"
    one = View(**dims, shape=(6, 8), factors=experts, index=((2, 3), (0, 6), (0, 8)))
    assert one.part(0, 2) is None
    assert str(one.part(2, 2)) == "[0:6, 0:8]"
    turned = View(**dims, shape=(4, 8, 6), factors=experts, index=((0, 4), (0, 6), (0, 8)), permute=(0, 2, 1))
    assert str(turned.part(1, 2)) == "[1:3, 0:8, 0:6]"
    inside = View(**dims, shape=(24,), factors=((4,), (6,)), index=((0, 4), (0, 6)), permute=(1, 0))
    assert str(inside.part(1, 2)) == "[0:24]"


@settings(max_examples=200, deadline=None)
@given(views())
def test_groups_multiply_to_the_external_shape(view):
    assert tuple(math.prod(view.index_shape[d] for d in group) for group in view.groups) == view.shape


def test_q_of_a_fused_qkv():
    n_kv, r, hd, dim = 2, 5, 3, 4
    wqkv = torch.randn(n_kv * r * hd, dim)
    factors, full = ((n_kv, r, hd), (dim,)), ((0, hd), (0, dim))
    q, k, v = (
        View(
            name=n,
            fqn="wqkv",
            shape=(n_kv * (b - a) * hd, dim),
            factors=factors,
            index=((0, n_kv), (a, b), *full),
        )
        for n, a, b in (("q", 0, r - 2), ("k", r - 2, r - 1), ("v", r - 1, r))
    )
    expected_q, expected_k, expected_v = wqkv.view(n_kv, r, hd, dim).split([r - 2, 1, 1], dim=1)
    for view, expected in ((q, expected_q), (k, expected_k), (v, expected_v)):
        assert torch.equal(view.read(wqkv), expected.reshape(-1, dim))


def test_one_expert_and_identity():
    w1_EFD = torch.randn(4, 3, 2)
    view = View(name="e", fqn="w1", shape=(3, 2), factors=((4,), (3,), (2,)), index=((2, 3), (0, 3), (0, 2)))
    assert torch.equal(view.read(w1_EFD), w1_EFD[2])
    assert view.read(w1_EFD).data_ptr() == w1_EFD[2].data_ptr()
    assert not view.is_identity
    same = View.identity("a", "b", (4, 3, 2))
    assert same.is_identity
    assert torch.equal(same.read(w1_EFD), w1_EFD)
    assert hash(same) == hash(same)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"factors": ((2, 3), ())}, "at least one size"),
        ({"index": ((0, 2), (0, 3))}, "2 intervals in index for 3"),
        ({"index": ((0, 2), (0, 4), (0, 5))}, "not inside a factored dim of size 3"),
        ({"permute": (0, 0, 1)}, "not an order"),
        ({"shape": (7, 5)}, "does not hold"),
        ({"shape": (3, 10)}, "factor the dims further"),
    ],
)
def test_what_is_refused(change, says):
    good = {
        "name": "x",
        "fqn": "w",
        "shape": (6, 5),
        "factors": ((2, 3), (5,)),
        "index": ((0, 2), (0, 3), (0, 5)),
    }
    with pytest.raises(BridgeError, match=says):
        View(**{**good, **change})


def test_tensors_of_another_shape_are_refused():
    view = View.identity("x", "w", (2, 3))
    with pytest.raises(BridgeError, match=r"w has shape \(3, 2\)"):
        view.read(torch.zeros(3, 2))
    with pytest.raises(BridgeError, match=r"x has shape \(6,\)"):
        view.write(torch.zeros(2, 3), torch.zeros(6))
    with pytest.raises(BridgeError, match="rows 1 to 3 of 2"):
        view.write(torch.zeros(2, 3), torch.zeros(2, 3), first=1)
