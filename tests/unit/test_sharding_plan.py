"""A plan, executed element by element on small tensors, fills every destination with the right elements, once."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sharding_samples import boxes_of, chunked, tensor, whole
from tests.unit.test_sharding_boxes import shardings
from tests.unit.test_sharding_view import views
from titan_bridge.errors import BridgeError
from titan_bridge.sharding import Box, Layout, MeshLayout, ParamLayout, ShardingSpec, View, placement_from_str
from titan_bridge.sharding.boxes import local_shape_of, pieces_of
from titan_bridge.sharding.layout import torch_dtype
from titan_bridge.sharding.plan import Plan, plan
from titan_bridge.sharding.tensors import OnMesh, TensorMetadata


def local_tensors(held: TensorMetadata, full: torch.Tensor | None) -> dict:
    """(holder, chunk) to local tensor: cut from `full`, or filled with -1."""
    result = {}
    if held.on is None:
        for chunk, part in enumerate(held.chunks):
            box = part.box
            result[part.owner, chunk] = (
                torch.full(box.shape, -1) if full is None else full[box.slices].contiguous().clone()
            )
        return result
    mesh = held.on.mesh
    for rank in mesh.ranks:
        arguments = (held.on.placements, held.shape, mesh.shape, mesh.coordinate(rank))
        local = torch.full(local_shape_of(*arguments), -1)
        if full is not None:
            for piece in pieces_of(*arguments):
                local[piece.local.slices] = full[piece.box.slices]
        result[rank, None] = local
    return result


def execute(result: Plan, sources: dict, destinations: dict) -> tuple[dict, dict]:
    """Run every copy; returns (bytes by pair of different holders or sides, writes per destination element)."""
    written = {key: torch.zeros(t.shape, dtype=torch.int64) for key, t in destinations.items()}
    traffic: dict = {}
    count = 0
    for copy in result.copies():
        count += 1
        source = sources[copy.source_name, copy.source, copy.source_chunk]
        key = (copy.destination_name, copy.destination, copy.destination_chunk)
        source_window = copy.source_window.of(source)
        assert copy.elements == source_window.numel() > 0
        copy.destination_window.of(destinations[key]).copy_(source_window)
        window = copy.destination_window.of(written[key])
        window += 1
        pair = (copy.source, copy.destination)
        traffic[pair] = traffic.get(pair, 0) + copy.elements * 8
    assert count == result.copies_count
    return traffic, written


def check(
    source: list[TensorMetadata],
    destination: list[TensorMetadata],
    full: dict,
    colocated: bool = False,
    **options,
) -> Plan:
    """The oracle. `full` has the global tensor of every name, on both sides."""
    result = plan(source, destination, colocated=colocated, **options)
    sources = {(h.name, *k): t for h in source for k, t in local_tensors(h, full[h.name]).items()}
    destinations = {(h.name, *k): t for h in destination for k, t in local_tensors(h, None).items()}
    traffic, written = execute(result, sources, destinations)
    for held in destination:
        for key, expected in local_tensors(held, full[held.name]).items():
            assert torch.equal(destinations[held.name, *key], expected), (held.name, key)
            assert (written[held.name, *key] == 1).all()
    # What travels, counted copy by copy, is what the plan says.
    moved = {pair: n for pair, n in traffic.items() if not (colocated and pair[0] == pair[1])}
    assert result.bytes == sum(moved.values()) == result.lower_bound
    for holder, sent in result.sent.items():
        assert sent == sum(n for (a, _), n in moved.items() if a == holder)
    for holder, received in result.received.items():
        assert received == sum(n for (_, b), n in moved.items() if b == holder)
    matrix = result.traffic()
    index = {holder: i for i, holder in enumerate(result.owners)}
    assert {
        (a, b): int(matrix[index[a], index[b]]) for a in index for b in index if matrix[index[a], index[b]]
    } == moved
    assert sum(result.by_tensor().values()) == result.bytes
    assert result.bytes == lower_bound(source, destination, colocated)
    return result


def held_elements(held: TensorMetadata, holder) -> torch.Tensor:
    """Which elements of the global tensor a holder has."""
    has = torch.zeros(held.shape, dtype=torch.bool)
    if held.on is None:
        boxes = [chunk.box for chunk in held.chunks if chunk.owner == holder]
    else:
        mesh = held.on.mesh
        coordinate = mesh.coordinate(holder) if isinstance(holder, int) else None
        boxes = [] if coordinate is None else boxes_of(held.on.placements, held.shape, mesh.shape, coordinate)
    for box in boxes:
        has[box.slices] = True
    return has


def lower_bound(source: list[TensorMetadata], destination: list[TensorMetadata], colocated: bool) -> int:
    """Bytes lacking, element by element (for tensors with the same name on both sides; else everything)."""
    sources = {held.name: held for held in source}
    total = 0
    for held in destination:
        for (holder, _), local in local_tensors(held, None).items():
            total += local.numel() * 8
            if colocated and held.name in sources:
                chunks = [held]
                if held.on is None:
                    chunks = [h for h in split_chunks(held) if h.chunks[0].owner == holder]
                    chunks = [h for h in chunks if h.chunks[0].box.shape == local.shape][:1]
                mine = held_elements(sources[held.name], holder) & held_elements(chunks[0], holder)
                total -= int(mine.sum()) * 8
    return total


def split_chunks(held: TensorMetadata) -> list[TensorMetadata]:
    return [tensor(name=held.name, shape=held.shape, dtype=held.dtype, by=(c,)) for c in held.chunks]


def numbered(shape) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


@st.composite
def meshes_and_placements(draw, shape, max_ranks=12, world=20):
    placements, _, mesh_shape = draw(shardings(max_ranks=max_ranks).filter(lambda s: fits(s[0], shape)))
    mesh = MeshLayout.make([f"a{i}" for i in range(len(mesh_shape))], mesh_shape)
    ranks = draw(st.permutations(range(world)))[: len(mesh.ranks)]
    return OnMesh(mesh=MeshLayout.make(mesh.axes, mesh.shape, ranks), placements=placements)


def fits(placements, shape) -> bool:
    return all(getattr(p, "dim", -1) < len(shape) for p in placements)


shapes = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)


@settings(max_examples=300, deadline=None)
@given(st.data(), shapes, st.booleans())
def test_any_placements_to_any_placements(data, shape, colocated):
    source = tensor(name="w", shape=shape, dtype=torch.int64, by=data.draw(meshes_and_placements(shape)))
    destination = tensor(name="w", shape=shape, dtype=torch.int64, by=data.draw(meshes_and_placements(shape)))
    check([source], [destination], {"w": numbered(shape)}, colocated)


@settings(max_examples=300, deadline=None)
@given(st.data(), views(max_factor=3), st.booleans())
def test_any_view_in_both_directions(data, view, to_external):
    """Both tensors sharded in any way: files, checkpoints of the external names, and ranks."""
    titan = numbered(view.titan_shape)
    external = view.read(titan).contiguous()
    sides = [
        tensor(
            name=n,
            shape=tuple(t.shape),
            dtype=torch.int64,
            by=data.draw(meshes_and_placements(tuple(t.shape), 6)),
        )
        for n, t in (("titan", titan), ("external", external))
    ]
    full = {"titan": titan, "external": external}
    if to_external:
        check(sides[:1], sides[1:], full, views=[view])
        return
    result = plan(sides[1:], sides[:1], [view], allow_missing=True)
    sources = {("external", *k): t for k, t in local_tensors(sides[1], external).items()}
    destinations = {("titan", *k): t for k, t in local_tensors(sides[0], None).items()}
    execute(result, sources, destinations)
    expected = torch.full_like(titan, -1)
    view.write(expected, external)
    for key, local in local_tensors(sides[0], expected).items():
        assert torch.equal(destinations["titan", *key], local)
    assert result.missing.get("titan", 0) == titan.numel() - external.numel()


@st.composite
def chunkings(draw, shape, holders=("a", "b", 3, 4)):
    """Boxes that cover the tensor: a random grid, with replicas, and maybe boxes that overlap."""
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    grid = [
        Box(start=tuple(a for a, _ in corner), stop=tuple(b for _, b in corner))
        for corner in itertools.product(*(itertools.pairwise(line) for line in cuts))
    ]
    who = st.sampled_from(holders)
    chunks = [(draw(who), box) for box in grid]
    for _ in range(draw(st.integers(0, 3))):
        chunks.append((draw(who), draw(st.sampled_from(grid))))
    for _ in range(draw(st.integers(0, 2))):
        start = tuple(draw(st.integers(0, size - 1)) for size in shape)
        stop = tuple(draw(st.integers(a + 1, size)) for a, size in zip(start, shape, strict=True))
        chunks.append((draw(who), Box(start=start, stop=stop)))
    return chunked(tuple(chunks))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
def test_chunks_to_ranks_and_back(data, shape):
    chunks = tensor(name="w", shape=shape, dtype=torch.int64, by=data.draw(chunkings(shape)))
    others = data.draw(st.one_of(meshes_and_placements(shape, 8), chunkings(shape)))
    ranks = tensor(name="w", shape=shape, dtype=torch.int64, by=others)
    full = {"w": numbered(shape)}
    check([chunks], [ranks], full)
    check([ranks], [chunks], full)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
def test_chunks_that_a_rank_has_stay(data, shape):
    """Overlapping chunks of several ranks, on the ranks that want the tensor."""
    chunks = tensor(
        name="w", shape=shape, dtype=torch.int64, by=data.draw(chunkings(shape, holders=(0, 1, 2, 5)))
    )
    ranks = tensor(
        name="w", shape=shape, dtype=torch.int64, by=data.draw(meshes_and_placements(shape, 6, world=6))
    )
    check([chunks], [ranks], {"w": numbered(shape)}, colocated=True)


@settings(max_examples=100, deadline=None)
@given(st.data(), views(max_dims=2, max_factor=3))
def test_chunks_seen_through_a_view(data, view):
    """A checkpoint's chunks of an external name, cut anywhere, to ranks that hold the TorchTitan tensor."""
    titan = numbered(view.titan_shape)
    full = {"titan": titan, "external": view.read(titan).contiguous()}
    source = tensor(
        name="titan", shape=tuple(titan.shape), dtype=torch.int64, by=data.draw(chunkings(titan.shape))
    )
    destination = tensor(
        name="external", shape=view.shape, dtype=torch.int64, by=data.draw(chunkings(view.shape))
    )
    check([source], [destination], full, views=[view])


def spec(mesh, *placements):
    return ShardingSpec(mesh=mesh, placements=tuple(map(placement_from_str, placements)))


def test_fused_qkv_and_experts_from_files():
    n_kv, r, hd, dim, experts, hidden = 2, 4, 2, 6, 4, 5
    factors, tail = ((n_kv, r, hd), (dim,)), ((0, hd), (0, dim))
    fused = [
        View(
            name=n,
            fqn="wqkv",
            shape=(n_kv * (b - a) * hd, dim),
            factors=factors,
            index=((0, n_kv), (a, b), *tail),
        )
        for n, a, b in (("q", 0, r - 2), ("k", r - 2, r - 1), ("v", r - 1, r))
    ]
    grouped = [
        View(
            name=f"e{e}",
            fqn="w1",
            shape=(hidden, dim),
            factors=((experts,), (hidden,), (dim,)),
            index=((e, e + 1), (0, hidden), (0, dim)),
        )
        for e in range(experts)
    ]
    dense = MeshLayout.make(("dp_replicate", "fsdp", "tp"), (1, 2, 2))
    sparse = MeshLayout.make(("dp_replicate", "efsdp", "ep"), (1, 1, 4))
    layout = Layout(
        meshes={"dense": dense, "sparse": sparse},
        params={
            "wqkv": ParamLayout(
                spec=spec("dense", "R", "SS(0,2)", "S(0)"), shape=(n_kv * r * hd, dim), dtype="int64"
            ),
            "w1": ParamLayout(
                spec=spec("sparse", "R", "S(1)", "S(0)"), shape=(experts, hidden, dim), dtype="int64"
            ),
        },
    )
    full = {"wqkv": numbered((n_kv * r * hd, dim)), "w1": 1000 + numbered((experts, hidden, dim))}
    full |= {view.name: view.read(full[view.fqn]).contiguous() for view in [*fused, *grouped]}
    files = [whole(v.name, v.shape, torch.int64, f"file{i % 2}") for i, v in enumerate([*fused, *grouped])]
    ranks = [
        tensor(
            name=n,
            shape=p.shape,
            dtype=torch_dtype(p.dtype),
            by=OnMesh(mesh=layout.meshes[p.spec.mesh], placements=p.spec.placements),
        )
        for n, p in layout.params.items()
    ]
    check(files, ranks, full, views=[*fused, *grouped])
    check(ranks, files, full, views=[*fused, *grouped])
    assert plan(files, layout, [*fused, *grouped]).bytes == 8 * (full["wqkv"].numel() + full["w1"].numel())


def test_pipeline_stages_are_meshes():
    """Two stages of two ranks to two ranks that hold everything."""
    stages = {f"pp{s}": MeshLayout.make(("fsdp",), (2,), [2 * s, 2 * s + 1]) for s in range(2)}
    source = Layout(
        meshes=stages,
        params={
            f"l{i}": ParamLayout(spec=spec(f"pp{i // 2}", "S(0)"), shape=(6, 4), dtype="int64")
            for i in range(4)
        },
    )
    destination = Layout(
        meshes={"tp": MeshLayout.make(("tp",), (2,))},
        params={f"l{i}": ParamLayout(spec=spec("tp", "S(1)"), shape=(6, 4), dtype="int64") for i in range(4)},
    )
    result = plan(source, destination)
    assert len(result.groups) == 1
    assert {c.source for c in result.copies() if c.destination_name == "l3"} == {2, 3}
    assert set(result.sent.values()) == {2 * 6 * 4 * 8 // 2}  # two layers a stage, two ranks
    assert plan(destination, destination, colocated=True).bytes == 0
    assert plan(destination, destination).bytes == 4 * 6 * 4 * 8


def test_boxes_are_merged():
    """Same tensor on another mesh with the same cuts: one box a rank, also through strided shards and views."""
    mesh = MeshLayout.make(("fsdp", "tp"), (2, 2))
    by = OnMesh(mesh=mesh, placements=spec("m", "SS(0,2)", "S(0)").placements)
    flat = OnMesh(mesh=MeshLayout.make(("tp",), (4,)), placements=spec("m", "S(0)").placements)
    held = tensor(name="w", shape=(16, 3), dtype=torch.int64, by=by)
    assert plan([held], [tensor(name="w", shape=(16, 3), dtype=torch.int64, by=flat)]).copies_count == 4
    view = View(name="x", fqn="w", shape=(8, 3), factors=((4, 4), (3,)), index=((0, 4), (0, 2), (0, 3)))
    one = OnMesh(mesh=MeshLayout.make(("tp",), (1,)), placements=spec("m", "S(0)").placements)
    assert (
        plan(
            [tensor(name="w", shape=(16, 3), dtype=torch.int64, by=one)],
            [whole("x", (8, 3), torch.int64, "f")],
            [view],
        ).copies_count
        == 1
    )


def test_the_same_plan_every_time():
    by = OnMesh(mesh=MeshLayout.make(("r", "s"), (3, 2)), placements=spec("m", "R", "S(0)").placements)
    source = [tensor(name=f"w{i}", shape=(5 + i, 3), dtype=torch.int64, by=by) for i in range(5)]
    destination = [whole(f"w{i}", (5 + i, 3), torch.int64, "a", "b") for i in range(5)]
    first, second = (list(plan(source, destination).copies()) for _ in range(2))
    assert first == second


def test_copies_of_one_holder():
    by = OnMesh(mesh=MeshLayout.make(("r", "s"), (2, 2)), placements=spec("m", "R", "S(0)").placements)
    held = tensor(name="w", shape=(6, 3), dtype=torch.int64, by=by)
    result = plan([held], [whole("w", (6, 3), torch.int64, "a", "b")])
    everything = list(result.copies())
    for source in (0, 3, None):
        for destination in ("b", None):
            expected = [
                c for c in everything if source in (None, c.source) and destination in (None, c.destination)
            ]
            assert list(result.copies(source=source, destination=destination)) == expected
    assert list(result.copies(destination="c")) == []


def refused(says, source, destination, views=(), **options):
    with pytest.raises(BridgeError, match=says):
        plan(source, destination, views, **options)


def test_what_is_refused():
    w, e = (
        whole("w", (4, 2), torch.int64, "f"),
        whole("e", (4, 2), torch.int64, "f"),
    )
    refused("w is in no source tensor.*nor does a view", [e], [w])
    refused(
        r"shape \(4, 2\) in the source and \(2, 4\)",
        [w],
        [whole("w", (2, 4), torch.int64, "g")],
    )
    same = View.identity("e", "w", (4, 2))
    refused("w is in no source tensor; it would be filled from e", [], [w], [same])
    refused("needs", [whole("e", (2, 4), torch.int64, "f")], [w], [same])
    half = View(name="e", fqn="w", shape=(2, 2), factors=((4,), (2,)), index=((0, 2), (0, 2)))
    other = View(name="x", fqn="w", shape=(2, 2), factors=((2, 2), (2,)), index=((0, 1), (0, 2), (0, 2)))
    part, last = (
        whole("e", (2, 2), torch.int64, "f"),
        whole("x", (2, 2), torch.int64, "f"),
    )
    refused("4 of 8 elements come from no source tensor; its views", [part], [w], [half])
    refused("4 of 8 elements come from no source tensor; missing: x", [part], [w], [half, other])
    refused("views e and x write the same", [part, last], [w], [half, other])
    box = Box(start=(0, 0), stop=(3, 2))
    refused(
        "w: 2 elements of w are in no source",
        [tensor(name="w", shape=(4, 2), dtype=torch.int64, by=chunked((("f", box),)))],
        [w],
    )
    refused("w appears twice", [w, w], [w])
    result = plan([part, whole("z", (1,), torch.int64, "f")], [w], [half], allow_missing=True)
    assert result.missing == {"w": 4}
    assert result.unused == ("z",)
    assert result.bytes == 4 * 8
