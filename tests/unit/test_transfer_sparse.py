"""Sparse patches against dense tensors: what the router sends where, for random layouts, tensors and patches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.sharding.view import View
from titan_bridge.transfer.changes import _global, _share
from titan_bridge.transfer.exchange import Sides
from titan_bridge.transfer.samples import local_part, same_bits, sample_locals
from titan_bridge.transfer.sparse import (
    Outbox,
    Patch,
    Router,
    check_unique,
    index_dtype,
    to_external,
    to_titan,
)


@st.composite
def layouts(draw: st.DrawFn, dtype: str = "bfloat16") -> Layout:
    """One tensor "w" of one to three dims on a mesh of one to three axes."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    mesh_shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    placements = []
    for axis in range(len(mesh_shape)):
        dim = draw(st.integers(-1, len(shape) - 1))
        strided = draw(st.booleans()) and axis + 1 < len(mesh_shape)
        factor = math.prod(mesh_shape[axis + 1 :])
        if dim < 0:
            placements.append(Replicate())
        else:
            placements.append(_StridedShard(dim, split_factor=factor) if strided else Shard(dim))
    axes = tuple(f"a{i}" for i in range(len(mesh_shape)))
    ranks = draw(st.permutations(range(10, 10 + math.prod(mesh_shape))))
    spec = ShardingSpec(mesh="m", placements=tuple(placements))
    return Layout(
        meshes={"m": MeshLayout.make(axes, mesh_shape, ranks)},
        params={"w": ParamLayout(spec=spec, shape=shape, dtype=dtype)},
    )


def some(draw: st.DataObject, numel: int) -> torch.Tensor:
    """Distinct flat indices, in any order."""
    return torch.tensor(
        draw.draw(st.lists(st.integers(0, numel - 1), unique=True, max_size=30)), dtype=torch.int64
    )


def apply(outbox: Outbox, live: dict[int, dict[str, torch.Tensor]]) -> None:
    for rank, tensors in outbox.to.items():
        for name, parts in tensors.items():
            for entries in parts:
                assert entries.positions.dtype == index_dtype(live[rank][name].numel())
                live[rank][name].view(-1)[entries.positions.long()] = entries.values


@settings(max_examples=200, deadline=None)
@given(layouts(), st.data())
def test_a_patch_equals_a_dense_update_on_every_rank(layout, data):
    shape = layout.params["w"].shape
    indices = some(data, math.prod(shape))
    values = torch.randn(len(indices))
    live = {rank: sample_locals(layout, rank, 0) for rank in layout.ranks}
    dense = torch.empty(shape, dtype=torch.bfloat16)
    for rank in layout.ranks:
        for piece in layout.pieces("w", rank):
            dense[piece.box.slices] = live[rank]["w"][piece.local.slices]
    dense.view(-1)[indices] = values.bfloat16()
    outbox = Router(layout).route([Patch(name="w", indices=indices, values=values)])
    apply(outbox, live)
    for rank in layout.ranks:
        assert same_bits(live[rank]["w"], local_part(dense, layout, "w", rank))
    # Each entry goes to those that hold it, replicas included, and to nobody else.
    holders = sum(math.prod(layout.local_shape("w", rank)) for rank in layout.ranks) / math.prod(shape)
    assert outbox.entries == len(indices) * holders


@settings(max_examples=100, deadline=None)
@given(layouts("float32"), st.data())
def test_local_positions_become_global_ones_and_replicas_share_the_work(layout, data):
    param, mesh = layout.params["w"], layout.meshes["m"]
    whole = torch.arange(math.prod(param.shape), dtype=torch.float32).reshape(param.shape)
    seen = torch.zeros(math.prod(param.shape), dtype=torch.int64)
    for rank in layout.ranks:
        local = local_part(whole, layout, "w", rank).view(-1)
        flat = _global(torch.arange(len(local)), param.shape, param.spec, mesh, rank)
        assert flat.tolist() == local.long().tolist()
        share, shares = _share(param.spec, mesh, rank)
        seen += torch.bincount(flat[flat % shares == share], minlength=len(seen))
    assert (seen == 1).all()


VIEWS = [
    View(name="q", fqn="wqkv", shape=(8, 6), factors=((2, 4, 2), (6,)), index=((0, 2), (0, 2), (0, 2), (0, 6))),
    View(name="k", fqn="wqkv", shape=(4, 6), factors=((2, 4, 2), (6,)), index=((0, 2), (2, 3), (0, 2), (0, 6))),
    View(name="v", fqn="wqkv", shape=(4, 6), factors=((2, 4, 2), (6,)), index=((0, 2), (3, 4), (0, 2), (0, 6))),
    View(
        name="rope",
        fqn="halves",
        shape=(8, 3),
        factors=((2, 2, 2), (3,)),
        index=((0, 2), (0, 2), (0, 2), (0, 3)),
        permute=(0, 2, 1, 3),
    ),
]  # fmt: skip


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_positions_through_a_view(view):
    titan = torch.arange(math.prod(view.titan_shape)).reshape(view.titan_shape)
    external = view.read(titan).reshape(-1)
    assert torch.equal(to_titan(view, torch.arange(len(external))), external)
    chosen, flat = to_external(view, torch.arange(titan.numel()))
    assert torch.equal(external[flat], chosen)


def two_sided(fqn: str = "wqkv", shape: tuple[int, ...] = (16, 6)) -> Layout:
    spec = ShardingSpec(mesh="m", placements=(Shard(0),))
    return Layout(
        meshes={"m": MeshLayout.make(("tp",), (2,))},
        params={fqn: ParamLayout(spec=spec, shape=shape, dtype="float32")},
    )


def test_names_of_either_side():
    whole = torch.zeros(16, 6)
    VIEWS[1].write(whole, torch.arange(24.0).reshape(4, 6) + 1)
    patch = Patch(name="k", indices=torch.arange(24), values=torch.arange(24.0) + 1)
    layout = two_sided()
    live = {rank: {"wqkv": torch.zeros(8, 6)} for rank in (0, 1)}
    apply(Router(layout, VIEWS).route([patch]), live)
    assert torch.equal(torch.cat([live[0]["wqkv"], live[1]["wqkv"]]), whole)

    # The other way round: the engine has k by itself, the trainer the fused tensor.
    indices = whole.view(-1).nonzero().view(-1)
    patch = Patch(name="wqkv", indices=indices, values=whole.view(-1)[indices])
    live = {rank: {"k": torch.zeros(2, 6)} for rank in (0, 1)}
    apply(Router(two_sided("k", (4, 6)), VIEWS).route([patch]), live)
    assert torch.equal(torch.cat([live[0]["k"], live[1]["k"]]), torch.arange(24.0).reshape(4, 6) + 1)


@pytest.mark.parametrize("indices", [[3, 5, 3], [-1, 2], [96], [1, 1]])
def test_bad_indices_are_refused(indices):
    patch = Patch(name="wqkv", indices=torch.tensor(indices), values=torch.zeros(len(indices)))
    with pytest.raises(
        BridgeError, match=r"patch for wqkv: index (3|-1|96|1) is (given twice|outside a tensor of 96)"
    ):
        Router(two_sided(), VIEWS).route([patch])


def test_other_mistakes_are_refused():
    with pytest.raises(BridgeError, match="no tensor of this name"):
        Router(two_sided()).route([Patch(name="x", indices=torch.arange(1), values=torch.zeros(1))])
    with pytest.raises(BridgeError, match="allowed: int32, int64"):
        Patch(name="x", indices=torch.zeros(1), values=torch.zeros(1))
    with pytest.raises(BridgeError, match="two flat tensors of one length"):
        Patch(name="x", indices=torch.arange(2), values=torch.zeros(1))


def test_tensors_of_more_than_2_31_elements():
    """Positions only: no memory of that size is needed."""
    rows, columns = 3 * 2**16, 2**16  # 1.3e10 elements
    spec = ShardingSpec(mesh="m", placements=(Shard(0),))
    layout = Layout(
        meshes={"m": MeshLayout.make(("tp",), (2,))},
        params={"w": ParamLayout(spec=spec, shape=(rows, columns), dtype="bfloat16")},
    )
    assert index_dtype(rows // 2 * columns) == torch.int64
    indices = torch.tensor([0, rows // 2 * columns - 1, rows // 2 * columns, rows * columns - 1])
    to = Router(layout).route([Patch(name="w", indices=indices, values=torch.arange(4.0))]).to
    assert [to[rank]["w"][0].positions.tolist() for rank in (0, 1)] == [[0, rows // 2 * columns - 1]] * 2


@given(st.lists(st.integers(0, 50), max_size=40))
def test_twice_is_twice_in_any_order(indices):
    if len(set(indices)) == len(indices):
        check_unique("w", torch.tensor(indices, dtype=torch.int64))
    else:
        with pytest.raises(BridgeError, match="given twice"):
            check_unique("w", torch.tensor(indices))


def test_each_of_the_trainers_tensors_is_compared_in_a_dtype_that_holds_what_the_engine_keeps():
    def side(**dtypes: str) -> Layout:
        spec = ShardingSpec(mesh="m", placements=(Replicate(),))
        return Layout(
            meshes={"m": MeshLayout.make(("a",), (1,))},
            params={name: ParamLayout(spec=spec, shape=(1,), dtype=dtype) for name, dtype in dtypes.items()},
        )

    def dtypes(source: Layout, destination: Layout) -> dict[str, torch.dtype]:
        sides = Sides(
            source=source,
            destination=destination,
            trainers=1,
            workers=((0, 0),),
            unpadded={},
            views=tuple(VIEWS[:3]),
        )
        return sides.engine_dtypes()

    trainer = side(wqkv="float32", norm="float32", value_head="float32")
    assert dtypes(trainer, side(wqkv="bfloat16", norm="float32")) == {
        "wqkv": torch.bfloat16,
        "norm": torch.float32,
    }
    # Views, from either side; of several dtypes one that holds them all.
    assert dtypes(side(q="float32", v="float64"), side(wqkv="bfloat16")) == dict.fromkeys(
        "qv", torch.bfloat16
    )
    assert dtypes(trainer, side(q="bfloat16", k="float16", v="bfloat16")) == {"wqkv": torch.float32}
