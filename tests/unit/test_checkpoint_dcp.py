"""DCP: what opening reads, which chunks cover a tensor, and metadata made to cost time or memory."""

from __future__ import annotations

import pickle
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import filesystem, metadata

from titan_bridge.checkpoint import open_checkpoint
from titan_bridge.checkpoint.checkpoint import check_cover
from titan_bridge.checkpoint.dcp import METADATA
from titan_bridge.errors import BridgeError
from titan_bridge.sharding.boxes import Box


def test_opening_reads_the_metadata_alone(tmp_path):
    """The data are garbage of the right length: names, shapes and dtypes are there, and reading says what is wrong."""
    state = {"a": torch.randn(6, 4), "b": torch.randn(3).bfloat16()}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    (file,) = tmp_path.glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))
    with open_checkpoint(tmp_path) as checkpoint:
        assert {(s.name, s.shape, s.dtype) for s in checkpoint.tensors.values()} == {
            ("a", (6, 4), torch.float32),
            ("b", (3,), torch.bfloat16),
        }
        with pytest.raises(BridgeError, match=f"{file.name}: a at .*no end of a zip archive"):
            checkpoint.read("a")
        file.write_bytes(whole)
        assert all(torch.equal(checkpoint.read(name), state[name]) for name in state)
        assert checkpoint.bytes_read == 6 * 4 * 4 + 3 * 2


def test_an_archive_of_another_tensor_is_refused(tmp_path):
    dcp.save({"a": torch.randn(6, 4)}, checkpoint_id=tmp_path, no_dist=True)
    (file,) = tmp_path.glob("*.distcp")
    small = tmp_path / "small"
    dcp.save({"a": torch.randn(4, 6)}, checkpoint_id=small, no_dist=True)
    file.write_bytes((small / file.name).read_bytes())
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(BridgeError, match=r"\(4, 6\), the metadata says"),
    ):
        checkpoint.read("a")


@st.composite
def tilings(draw) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that cut it again and again; then, maybe, one of them changed, dropped or repeated."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        d = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(box.start[d], box.stop[d]))
        boxes.append(Box(start=box.start, stop=(*box.stop[:d], at, *box.stop[d + 1 :])))
        boxes.append(Box(start=(*box.start[:d], at, *box.start[d + 1 :]), stop=box.stop))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(boxes) - 1))
        ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
        other = Box(start=tuple(a for a, _ in ends), stop=tuple(b for _, b in ends))
        boxes[at : at + 1] = draw(st.sampled_from([[other], [], [boxes[at]] * 2, [boxes[at], other]]))
        boxes = boxes or [other]
    return shape, boxes


@settings(max_examples=500, deadline=None)
@given(tilings())
def test_chunks_cover_as_a_mask_says(tiling):
    """Oracle: a count for each element. Equal boxes are replicas and count once."""
    shape, boxes = tiling
    count = np.zeros(shape, dtype=int)
    for box in set(boxes):
        count[box.slices] += 1
    if (count == 1).all():
        check_cover("a", shape, boxes)
    else:
        with pytest.raises(BridgeError, match="overlap" if count.sum() >= count.size else "hold"):
            check_cover("a", shape, boxes)


@pytest.mark.parametrize("cuts", [(1, 0), (0, 1), (1, 1)])
def test_the_cover_of_chunks_takes_steps_in_proportion(cuts):
    """Calls, not seconds: columns, rows and a grid of four times as many chunks take about four times as many."""

    def calls(each: int) -> int:
        rows, columns = (each if cut else 1 for cut in cuts)
        boxes = [Box(start=(i, j), stop=(i + 1, j + 1)) for i in range(rows) for j in range(columns)]
        made = 0

        def count(*_: object) -> None:
            nonlocal made
            made += 1

        sys.setprofile(count)
        try:
            check_cover("a", (rows, columns), boxes)
        finally:
            sys.setprofile(None)
        return made

    few, many = (10, 20) if all(cuts) else (100, 400)
    assert calls(many) < 5 * calls(few)


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


def made(kind: str, state: bytes, module: str = "metadata") -> bytes:
    """An object of one of DCP's classes whose state is what `state` pushes."""
    return (
        named(f"torch.distributed.checkpoint.{module}", kind) + pickle.EMPTY_TUPLE + pickle.NEWOBJ
        + state + pickle.BUILD
    )  # fmt: skip


def document(state: bytes) -> bytes:
    return pickle.PROTO + b"\x04" + made("Metadata", state) + pickle.STOP


def doubling() -> bytes:
    """A tuple of a tuple twice, 31 times over."""
    return pickle.EMPTY_TUPLE + b"".join(
        pickle.BINPUT + bytes([i]) + pickle.BINGET + bytes([i]) + pickle.TUPLE2 for i in range(31)
    )


def key(pushed: bytes) -> bytes:
    """A dict with one key, None."""
    return pickle.EMPTY_DICT + pushed + pickle.NONE + pickle.SETITEM


ONES = pickle.EMPTY_LIST + pickle.BINPUT + b"\0(" + 100_000 * (pickle.BININT1 + b"\1") + pickle.APPENDS
SIZE = named("torch", "Size") + pickle.BINGET + b"\0" + pickle.TUPLE1 + pickle.REDUCE
BIG = pickle.BINUNICODE + (5 << 20).to_bytes(4, "little") + bytes(5 << 20)
PLACE = key(
    made("MetadataIndex", pickle.EMPTY_DICT + text("fqn") + doubling() + pickle.SETITEM)
    + made("_StorageInfo", pickle.EMPTY_DICT, "filesystem")
).replace(pickle.NONE + pickle.SETITEM, pickle.SETITEM)
NUMBERS = b"".join(
    pickle.LONG1 + b"\x0c" + (k * (2**61 - 1)).to_bytes(12, "little") + b"N" for k in range(60_000)
)
ATTACKS = {
    "a key that takes 2**31 steps to hash": key(doubling()),
    "a name of 2**31 words": b"}(" + text("state_dict_metadata") + b"}" + text("storage_data") + PLACE + b"u",
    "a memo with room for 2**26": key(BIG + pickle.LONG_BINPUT + (1 << 25).to_bytes(4, "little")),
    "2,000 copies of one list": ONES + 2000 * SIZE + pickle.EMPTY_DICT,
    "numbers with one hash": b"}(" + NUMBERS + b"u",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_metadata_takes_no_more_than_its_size(tmp_path, attack):
    data = document(ATTACKS[attack])
    (tmp_path / METADATA).write_bytes(data)
    tracemalloc.start()
    before = time.process_time()
    try:
        with pytest.raises(BridgeError, match=METADATA) as caught:
            open_checkpoint(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - before < 2
    assert peak < 100 * len(data) + (8 << 20)
    assert len(str(caught.value)) < 1000


@pytest.mark.timeout(30)
def test_one_list_of_chunks_for_many_tensors_is_refused(tmp_path):
    """The pickle names one list of 3,000 chunks 3,000 times: nine million of them in 300 kB."""
    (tmp_path / "f").write_bytes(bytes(9))
    chunks = [
        metadata.ChunkStorageMetadata(offsets=torch.Size((i,)), sizes=torch.Size((1,))) for i in range(3000)
    ]
    entry = metadata.TensorStorageMetadata(
        properties=metadata.TensorProperties(), size=torch.Size((3000,)), chunks=chunks
    )
    place = filesystem._StorageInfo("f", 0, 9)
    places = {metadata.MetadataIndex("t0", chunk.offsets): place for chunk in chunks}
    entries = {f"t{i}": entry for i in range(3000)}
    hostile = metadata.Metadata(state_dict_metadata=entries, storage_data=places)
    (tmp_path / METADATA).write_bytes(pickle.dumps(hostile))
    with pytest.raises(BridgeError, match="nothing says where t1 at"):
        open_checkpoint(tmp_path)
