"""Loads among replicas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sharding_samples import tensor, whole
from titan_bridge.sharding import Layout, MeshLayout, ParamLayout, ShardingSpec, placement_from_str
from titan_bridge.sharding.balance import deal, fill
from titan_bridge.sharding.plan import plan
from titan_bridge.sharding.tensors import OnMesh


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    st.integers(0, 40),
    st.integers(1, 12),
)
def test_filling_in_bulk_equals_one_copy_at_a_time(loads, items, size):
    greedy = list(loads)
    for _ in range(items):
        greedy[greedy.index(min(greedy))] += size
    count = fill(np.array([loads]), np.array([items]), np.array([size]))[0]
    assert count.sum() == items
    assert sorted(np.array(loads) + count * size) == sorted(greedy)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_dealing_counts_what_it_deals(data):
    shards, replicas = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    senders = np.arange(shards * replicas).reshape(shards, replicas)
    senders[0, data.draw(st.integers(1, replicas)) :] = -1
    pairs, copies = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    shard = np.array(data.draw(st.lists(st.integers(0, shards - 1), min_size=pairs, max_size=pairs)))
    size = np.array(data.draw(st.lists(st.integers(1, 9), min_size=pairs, max_size=pairs)))
    flags = data.draw(st.lists(st.booleans(), min_size=pairs * copies, max_size=pairs * copies))
    wanted = np.array(flags).reshape(pairs, copies)
    loads = np.zeros(shards * replicas, dtype=np.int64)
    choice = deal(loads, senders, shard, size, wanted)
    expected = np.zeros_like(loads)
    for pair, copy in np.argwhere(wanted):
        who = senders[shard[pair], choice[pair, copy]]
        assert who >= 0
        expected[who] += size[pair]
    assert (loads == expected).all()


def spec(mesh, *placements):
    return ShardingSpec(mesh=mesh, placements=tuple(map(placement_from_str, placements)))


def model(dense, sparse, dense_axis, sparse_axis, layers=6) -> Layout:
    """A small MoE: attention, a norm and experts in each layer, and an embedding."""
    ranks = {"dense": dense, "sparse": sparse}

    def param(mesh, shape, *placements):
        return ParamLayout(spec=spec(mesh, *placements), shape=shape, dtype="bfloat16")

    params = {"embed": param("dense", (480, 96), "R", *dense_axis[0])}
    for i in range(layers):
        params[f"{i}.wqkv"] = param("dense", (288, 96), "R", *dense_axis[0])
        params[f"{i}.wo"] = param("dense", (96, 192), "R", *dense_axis[1])
        params[f"{i}.norm"] = param("dense", (96,), "R", *dense_axis[2])
        params[f"{i}.w1"] = param("sparse", (24, 48, 96), "R", *sparse_axis)
    return Layout(meshes=ranks, params=params)


@pytest.mark.parametrize(("replicas", "dp", "tp"), [(2, 2, 1), (2, 4, 2), (3, 2, 4), (4, 1, 1)])
def test_hsdp_senders_share_the_work(replicas, dp, tp):
    """dp_replicate x fsdp=2 x tp=2 to dp x tp: the most loaded sender is within 1.1 of the mean."""
    source = model(
        MeshLayout.make(("dp_replicate", "fsdp", "tp"), (replicas, 2, 2)),
        MeshLayout.make(("dp_replicate", "efsdp", "ep"), (replicas, 1, 4)),
        (("SS(0,2)", "S(0)"), ("S(0)", "S(1)"), ("S(0)", "R")),
        ("S(1)", "S(0)"),
    )
    destination = model(
        MeshLayout.make(("dp_replicate", "fsdp", "tp"), (1, dp, tp)),
        MeshLayout.make(("dp_replicate", "efsdp", "ep"), (1, 1, dp * tp)),
        (("R", "S(0)"), ("R", "S(1)"), ("R", "R")),
        ("S(1)", "S(0)"),
    )
    assert plan(source, destination).balance <= 1.1


def test_replicas_make_up_for_what_only_one_can_send():
    """Ranks 0 and 1 alone have `a`; `b` is on all four: 2 and 3 send it."""
    alone = OnMesh(mesh=MeshLayout.make(("s",), (2,)), placements=spec("m", "S(0)").placements)
    shared = OnMesh(mesh=MeshLayout.make(("r",), (4,)), placements=spec("m", "R").placements)
    source = [
        tensor(name="a", shape=(8,), dtype=torch.float32, by=alone),
        *(tensor(name=f"b{i}", shape=(2,), dtype=torch.float32, by=shared) for i in range(4)),
    ]
    destination = [whole(held.name, held.shape, held.dtype, "f") for held in source]
    assert plan(source, destination).sent == {0: 16, 1: 16, 2: 16, 3: 16}


def test_a_rank_that_is_its_own_source_sends_nothing_to_itself():
    mesh = MeshLayout.make(("dp_replicate", "tp"), (2, 2))
    by = OnMesh(mesh=mesh, placements=spec("m", "R", "S(0)").placements)
    everywhere = OnMesh(mesh=mesh, placements=spec("m", "R", "R").placements)
    source = [tensor(name="w", shape=(8, 2), dtype=torch.float32, by=by)]
    destination = [tensor(name="w", shape=(8, 2), dtype=torch.float32, by=everywhere)]
    result = plan(source, destination, colocated=True)
    assert result.received == dict.fromkeys(range(4), 32)
    assert result.sent == dict.fromkeys(range(4), 32)
    local = [copy for copy in result.copies() if copy.source == copy.destination]
    assert sum(copy.elements for copy in local) * 4 == 4 * 32


def test_the_floor_is_what_the_stages_weigh():
    """Stage 0 has three layers and stage 1 one; no choice can even that out."""
    stages = {s: MeshLayout.make(("r",), (2,), [2 * s, 2 * s + 1]) for s in range(2)}
    replicated = spec("m", "R").placements
    source = [
        tensor(
            name=f"l{i}",
            shape=(4,),
            dtype=torch.float32,
            by=OnMesh(mesh=stages[i // 3], placements=replicated),
        )
        for i in range(4)
    ]
    result = plan(source, [whole(held.name, held.shape, held.dtype, "a", "b") for held in source])
    assert result.sent == {0: 48, 1: 48, 2: 16, 3: 16}
    assert result.load_floor == 48
    assert result.balance == result.balance_floor == 1.5


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_sender_is_under_the_floor_and_loads_differ_by_one_copy(data):
    """Replicas of one mesh that can all send everything differ by no more than the largest copy."""
    replicas = data.draw(st.integers(1, 6))
    by = OnMesh(mesh=MeshLayout.make(("r",), (replicas,)), placements=spec("m", "R").placements)
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=12))
    source = [tensor(name=f"w{i}", shape=(size,), dtype=torch.int8, by=by) for i, size in enumerate(sizes)]
    files = ["a", "b", "c"][: data.draw(st.integers(1, 3))]
    result = plan(source, [whole(held.name, held.shape, held.dtype, *files) for held in source])
    loads = result.sent.values()
    assert max(loads) >= result.load_floor
    assert max(loads) - min(loads) <= max(sizes)
