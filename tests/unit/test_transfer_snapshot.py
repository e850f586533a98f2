"""Deltas against whole tensors: what a snapshot finds and a worker writes, for random layouts and changes."""

from __future__ import annotations

import math
import socket
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from titan_bridge.errors import BridgeError
from titan_bridge.memory import bytes_of
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.plan import plan
from titan_bridge.sharding.spec import ShardingSpec
from titan_bridge.sharding.view import View
from titan_bridge.testing_samples import local_part, same_bits, sample
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.fingerprints import of_messages
from titan_bridge.transfer.layouts import Sides, shifted
from titan_bridge.transfer.messages import messages
from titan_bridge.transfer.sender import Sender, Way
from titan_bridge.transfer.snapshot import Snapshot
from titan_bridge.transfer.staging import Staging
from titan_bridge.transfer.target import Target
from titan_bridge.transfer.transports import Tcp
from titan_bridge.transfer.wire import Connection, Deadline


def layout_of(
    shape: tuple[int, ...], mesh: tuple[int, ...], placements: list, dtype: str, name: str = "w"
) -> Layout:
    axes = tuple(f"a{i}" for i in range(len(mesh)))
    spec = ShardingSpec(mesh="m", placements=tuple(placements))
    param = ParamLayout(spec=spec, shape=shape, dtype=dtype)
    return Layout(meshes={"m": MeshLayout.make(axes, mesh)}, params={name: param})


@st.composite
def sides(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """A float32 trainer and a bfloat16 engine of one tensor "w", on meshes of their own."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))

    def side(dtype: str) -> Layout:
        mesh = tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=2)))
        placements = []
        for axis in range(len(mesh)):
            dim = draw(st.integers(-1, len(shape) - 1))
            strided = draw(st.booleans()) and axis + 1 < len(mesh)
            factor = math.prod(mesh[axis + 1 :])
            placements.append(
                Replicate() if dim < 0 else _StridedShard(dim, split_factor=factor) if strided else Shard(dim)
            )
        return layout_of(shape, mesh, placements, dtype)

    return side("float32"), side("bfloat16")


def pair() -> tuple[Connection, Connection]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends = (socket.create_connection(server.getsockname()), server.accept()[0])
    return tuple(Connection(end, "the other end", {}) for end in ends)


def between(source: Layout, destination: Layout, views: tuple[View, ...] = (), bucket_bytes: int = 64):
    """(messages by trainer rank and worker, by worker and trainer rank); workers count after trainer ranks."""
    first = len(source.ranks)
    moved = shifted(destination, first)
    made = plan(source, moved, views)
    dtypes = {name: param.dtype for name, param in destination.params.items()}
    out = {r: messages(made, dtypes, sender=r, bucket_bytes=bucket_bytes) for r in source.ranks}
    into = {
        w: messages(made, dtypes, receiver=first + w, bucket_bytes=bucket_bytes) for w in destination.ranks
    }
    return first, out, into


def transfer(out, into, local, live, deltas, first, exchanged: bool = False) -> int:
    """Everything over real sockets into live tensors, whose memory may be exchanged; returns the bytes."""
    total = 0
    for worker, incoming in into.items():
        mine = live[worker]

        def swap(tensors, mine=mine):
            before = {name: mine[name] for name in tensors}
            mine.update(tensors)
            return before

        target = Target(
            tensors=lambda mine=mine: mine,
            layout=Layout(meshes={}, params={}),
            rank=0,
            index=0,
            swap=swap if exchanged else None,
        )
        staging = Staging(incoming, target, live[worker])
        staging.prepare([rank for rank in incoming if first + worker not in deltas[rank]])
        staged = []
        for rank in incoming:
            here, there = pair()
            key = first + worker
            way = Way(connection=here, buckets=out[rank][key], transport=Tcp(here))
            sent = Sender().send({key: way}, local[rank], deltas[rank], 1, Deadline(60))
            entries, nbytes = staging.receive(rank, Tcp(there), 1, Deadline(60))
            assert sent == {key: nbytes}
            total += nbytes
            staged += entries
            here.close()
            there.close()
        staging.write(staged, staging.ahead(staged))
    return total


@settings(max_examples=100, deadline=None)
@given(sides(), st.data())
def test_a_delta_leaves_what_a_whole_update_leaves(sides, data):
    source, destination = sides
    first, out, into = between(source, destination)
    shape = source.params["w"].shape
    before = sample("w", shape, 1)
    after = before.clone()
    numel = math.prod(shape)
    where = data.draw(st.lists(st.integers(0, numel - 1), unique=True, max_size=max(1, numel // 5)))
    after.view(-1)[where] = torch.randn(len(where)) * torch.tensor(
        data.draw(st.sampled_from([1.0, 0.0, -0.0]))
    )
    snapshots, deltas, local = {}, {}, {}
    for rank in source.ranks:
        snapshots[rank] = Snapshot()
        snapshots[rank].take({"w": local_part(before, source, "w", rank)}, out[rank].values())
        local[rank] = {"w": local_part(after, source, "w", rank)}
        deltas[rank] = snapshots[rank].deltas(local[rank], out[rank])
    live = {w: {"w": local_part(before.bfloat16(), destination, "w", w)} for w in destination.ranks}
    came = transfer(out, into, local, live, deltas, first, exchanged=data.draw(st.booleans()))
    whole = sum(bucket.nbytes for by in into.values() for buckets in by.values() for bucket in buckets)
    assert came <= whole
    for worker in destination.ranks:
        assert same_bits(live[worker]["w"], local_part(after.bfloat16(), destination, "w", worker))
        ours: dict[str, int] = {}
        for rank in source.ranks:
            for name, value in of_messages({rank: out[rank].get(first + worker, ())}, local[rank]).items():
                ours[name] = (ours.get(name, 0) + value) % 2**64
        assert ours == of_messages(into[worker], live[worker])


def test_an_element_that_goes_there_and_back_is_not_lost():
    source, destination = (layout_of((64,), (1,), [Replicate()], d) for d in ("float32", "bfloat16"))
    first, out, into = between(source, destination)
    snapshot, live = Snapshot(), {0: {"w": torch.zeros(64, dtype=torch.bfloat16)}}
    local = {"w": torch.zeros(64)}
    snapshot.take(local, out[0].values())
    for value in (1.0, 0.0, 1.0):
        local["w"][5] = value
        deltas = snapshot.deltas(local, out[0])
        assert deltas[1].counts.sum() == 1
        transfer(out, into, {0: local}, live, {0: deltas}, first)
        snapshot.take(local, out[0].values())
        assert live[0]["w"][5] == value


def test_comparison_is_in_the_dtype_in_which_each_engine_keeps_a_tensor():
    """A change that bfloat16 does not see travels to the engine that keeps float32, and to no other."""
    local = {"w": torch.ones(64)}
    found = {}
    for dtype in ("float32", "bfloat16"):
        _, out, _ = between(*(layout_of((64,), (1,), [Replicate()], d) for d in ("float32", dtype)))
        found[dtype] = out[0][1]
    snapshot = Snapshot()
    snapshot.take(local, found.values())
    assert sum(kept.nbytes for kept in snapshot._kept.values()) == 64 * 4 + 64 * 2
    local["w"][3] += 1e-5
    deltas = snapshot.deltas(local, found)
    assert {name: int(delta.counts.sum()) for name, delta in deltas.items()} == {"float32": 1, "bfloat16": 0}
    assert deltas["bfloat16"].nbytes == deltas["bfloat16"].counts.nbytes


def test_a_delta_is_made_only_where_it_is_smaller():
    _, out, _ = between(*(layout_of((3000,), (1,), [Replicate()], d) for d in ("float32", "bfloat16")))
    snapshot, local = Snapshot(), {"w": torch.ones(3000)}
    assert snapshot.deltas(local, out[0]) == {}  # nothing is known yet
    snapshot.take(local, out[0].values())
    local["w"][:900] = 2
    assert snapshot.deltas(local, out[0])[1].nbytes < 6000
    local["w"][:1000] = 2  # 6 bytes each, and all of it is 6000
    assert snapshot.deltas(local, out[0]) == {}


VIEWS = (
    View(name="q", fqn="wqkv", shape=(8, 6), factors=((2, 4, 2), (6,)), index=((0, 2), (0, 2), (0, 2), (0, 6))),
    View(name="k", fqn="wqkv", shape=(4, 6), factors=((2, 4, 2), (6,)), index=((0, 2), (2, 3), (0, 2), (0, 6))),
    View(name="v", fqn="wqkv", shape=(4, 6), factors=((2, 4, 2), (6,)), index=((0, 2), (3, 4), (0, 2), (0, 6))),
)  # fmt: skip


@pytest.mark.parametrize("outward", [False, True])
def test_a_delta_through_views(outward):
    fused = layout_of((16, 6), (2,), [Shard(0)], "float32", "wqkv")
    parts = [layout_of(view.shape, (2,), [Shard(0)], "float32", view.name) for view in VIEWS]
    separate = Layout(meshes=parts[0].meshes, params={k: v for part in parts for k, v in part.params.items()})
    source, destination = (fused, separate) if outward else (separate, fused)
    first, out, into = between(source, destination, VIEWS)

    def whole(version: int) -> dict[str, torch.Tensor]:
        wqkv = sample("wqkv", (16, 6), 1)
        if version == 2:
            wqkv.view(-1)[::7] *= 3
        return {"wqkv": wqkv, **{view.name: view.read(wqkv).reshape(view.shape).clone() for view in VIEWS}}

    deltas, local = {}, {}
    for rank in source.ranks:
        snapshot = Snapshot()
        snapshot.take(
            {n: local_part(whole(1)[n], source, n, rank) for n in source.params}, out[rank].values()
        )
        local[rank] = {n: local_part(whole(2)[n], source, n, rank) for n in source.params}
        deltas[rank] = snapshot.deltas(local[rank], out[rank])
        assert deltas[rank].keys() == out[rank].keys()
    live = {
        w: {n: local_part(whole(1)[n], destination, n, w) for n in destination.params}
        for w in destination.ranks
    }
    transfer(out, into, local, live, deltas, first)
    for worker in destination.ranks:
        for name in destination.params:
            assert same_bits(live[worker][name], local_part(whole(2)[name], destination, name, worker)), name


@pytest.mark.parametrize(
    ("head", "counts", "positions", "reason"),
    [
        ({"number": 2, "kind": "delta"}, [], [], "announced"),
        ({"number": 1, "kind": "whole"}, [], [], "announced"),
        ({"number": 1, "kind": "delta"}, [9], [], "announced 9 of 8 elements"),
        ({"number": 1, "kind": "delta"}, [-1], [], "announced -1 of 8 elements"),
        ({"number": 1, "kind": "delta"}, [2], [3, 3], "do not rise"),
        ({"number": 1, "kind": "delta"}, [2], [3, 8], "do not rise"),
        ({"number": 1, "kind": "delta"}, [2], [-1, 4], "do not rise"),
    ],
)
def test_what_is_no_delta_is_refused(head, counts, positions, reason):
    _, _, into = between(*(layout_of((8,), (1,), [Replicate()], d) for d in ("float32", "float32")))
    live = {"w": torch.zeros(8)}
    target = Target(tensors=lambda: live, layout=Layout(meshes={}, params={}), rank=0, index=0)
    here, there = pair()
    here.send(head, Deadline(60))
    if counts:
        here.send_raw(bytes_of(torch.tensor(counts, dtype=torch.int32)), Deadline(60))
    if positions:
        here.send_raw(bytes_of(torch.tensor(positions, dtype=torch.int32)), Deadline(60))
        here.send_raw(bytes_of(torch.ones(len(positions))), Deadline(60))
    with pytest.raises(TransferError, match=reason):
        Staging(into[0], target, live).receive(0, Tcp(there), 1, Deadline(60))
    assert not live["w"].any()


@pytest.mark.parametrize("source", [((1,), [Replicate()]), ((2,), [Shard(1)])], ids=["exchanged", "packed"])
def test_what_waits_for_a_commit_lies_in_memory_that_the_target_makes(source):
    """It goes back to the system when a connection fails, which an allocator's may not do."""
    sides = (layout_of((8, 6), *source, "float32"), layout_of((8, 6), (1,), [Replicate()], "float32"))
    _, _, into = between(*sides)
    live, made = {"w": torch.zeros(8, 6)}, []

    def memory(like: torch.Tensor, device: torch.device) -> torch.Tensor:
        made.append(torch.empty_like(like, device=device))
        return made[-1]

    target = Target(
        tensors=lambda: live,
        layout=Layout(meshes={}, params={}),
        rank=0,
        index=0,
        memory=memory,
        swap=lambda tensors: live,
    )
    staging = Staging(into[0], target, live)
    staging.prepare(list(into[0]))
    assert staging.nbytes == sum(tensor.nbytes for tensor in made) >= 8 * 6 * 4


def test_an_engine_that_takes_nothing_keeps_no_other_from_getting_its_messages():
    """Both messages are packed, and two workers of the other engine have as many buffers as there are."""
    sides = (layout_of((600_000, 4), (1,), [Replicate()], dtype) for dtype in ("float32", "bfloat16"))
    _, out, _ = between(*sides, bucket_bytes=2**23)
    hung, taking = [pair() for _ in range(2)], pair()
    ways = {
        name: Way(link=name[0], connection=here, buckets=out[0][1], transport=Tcp(here))
        for name, (here, _) in {"a/0": hung[0], "a/1": hung[1], "b/0": taking}.items()
    }
    got = bytearray(600_000 * 4 * 2)

    def take() -> None:
        taking[1].receive(Deadline(60))
        time.sleep(0.3)  # until the others have their buffers
        taking[1].receive_raw(got, Deadline(60))

    thread = threading.Thread(target=take)
    thread.start()
    sender = Sender()
    sent = sender.send(ways, {"w": torch.ones(600_000, 4)}, {}, 1, Deadline(3))
    thread.join()
    assert sent["b/0"] == len(got)
    assert all("takes no more" in str(sent[f"a/{at}"]) for at in range(2))
    assert sender.buffer_bytes <= 2 * 2 * len(got)


def test_what_a_loader_gets_whole_is_in_the_hosts_memory():
    """A device has no room for the experts of a model beside those that it serves."""
    sides = (layout_of((8, 6), (1,), [Replicate()], "float32") for _ in range(2))
    _, _, into = between(*sides, bucket_bytes=1024)
    live, loaded = {"norm": torch.zeros(3, device="meta")}, {}
    target = Target(
        tensors=lambda: live,
        layout=layout_of((8, 6), (1,), [Replicate()], "float32"),
        rank=0,
        index=0,
        whole={"w": torch.float32},
        load=loaded.update,
    )
    ((bucket,),) = into.pop(0).values()
    (part,) = bucket.slices
    Staging({0: (bucket,)}, target, live).write([("w", part.window, torch.arange(48.0))])
    assert same_bits(loaded["w"], torch.arange(48.0).view(8, 6))


def test_a_delta_is_ready_before_the_commit():
    """In a copy of what is live, from which the target makes what it can; the commit exchanges memory alone."""
    _, out, into = between(*(layout_of((64,), (1,), [Replicate()], d) for d in ("float32", "bfloat16")))
    local, old = {"w": torch.ones(64)}, torch.ones(64, dtype=torch.bfloat16)
    live, snapshot, made = {"w": old}, Snapshot(), []

    def swap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        before = {name: live[name] for name in tensors}
        live.update(tensors)
        return before

    target = Target(
        tensors=lambda: live,
        layout=Layout(meshes={}, params={}),
        rank=0,
        index=0,
        swap=swap,
        ahead=lambda tensors: {name: tensor.clone() for name, tensor in tensors.items()},
        on_change=lambda names, ahead: made.append((names, ahead)),
    )
    snapshot.take(local, out[0].values())
    local["w"][5] = 3
    staging = Staging(into[0], target, live)
    staging.prepare([])
    here, there = pair()
    way = Way(connection=here, buckets=out[0][1], transport=Tcp(here))
    Sender().send({"w": way}, local, {"w": snapshot.deltas(local, out[0])[1]}, 1, Deadline(60))
    entries, _ = staging.receive(0, Tcp(there), 1, Deadline(60))
    ready = staging.ahead(entries)
    assert live["w"] is old
    assert (old == 1).all()
    staging.write(entries, ready)
    assert live["w"] is not old
    assert same_bits(live["w"], local["w"].bfloat16())
    ((names, ahead),) = made
    assert names == ["w"]
    assert same_bits(ahead["w"], live["w"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("changes", [7, 5000])
def test_from_gpu_to_gpu_through_the_hosts_memory(changes):
    source = layout_of((100, 64), (2,), [Shard(0)], "float32")
    destination = layout_of((100, 64), (2,), [Shard(1)], "bfloat16")
    first, out, into = between(source, destination, bucket_bytes=1024)
    before = sample("w", (100, 64), 1).cuda()
    after = before.clone()
    after.view(-1)[:changes] *= -1

    def local_of(whole: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
        return {"w": local_part(whole.cpu(), source, "w", rank).cuda()}

    deltas, local = {}, {}
    for rank in source.ranks:
        snapshot = Snapshot()
        snapshot.take(local_of(before, rank), out[rank].values())
        local[rank] = local_of(after, rank)
        deltas[rank] = snapshot.deltas(local[rank], out[rank])
    live = {
        w: {"w": local_part(before.bfloat16().cpu(), destination, "w", w).cuda()} for w in destination.ranks
    }
    transfer(out, into, local, live, deltas, first)
    for worker in destination.ranks:
        want = local_part(after.bfloat16().cpu(), destination, "w", worker)
        assert same_bits(live[worker]["w"].cpu(), want)


@pytest.mark.parametrize("whole", [True, False])
def test_of_a_padded_vocabulary_nothing_but_the_padding_may_be_missing(whole):
    """The engine's 8 rows are 7 and one of padding; "head" is a tensor of which the trainer has nothing."""
    trainer = layout_of((7, 4), (1,), [Replicate()], "float32", "embed")
    engine = layout_of((8, 4), (2,), [Shard(0)], "float32", "embed")
    if not whole:
        more = layout_of((8, 4), (2,), [Shard(0)], "float32", "head")
        engine = Layout(meshes=engine.meshes, params={**engine.params, **more.params})
    unpadded = dict.fromkeys(engine.params, 7)
    sides = Sides(source=trainer, destination=shifted(engine, 1), trainers=1, unpadded=unpadded)
    if whole:
        assert sides.plan().missing == {"embed": 4}
        return
    with pytest.raises(BridgeError, match=r"^the engine's head is in no tensor of the trainer .*has embed$"):
        sides.plan()
