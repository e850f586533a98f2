"""Positioned reads give what as_strided gives on the whole tensor; names stay inside; CRCs of parts combine."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_bridge.checkpoint import files
from titan_bridge.checkpoint.files import FilePool, inside
from titan_bridge.checkpoint.target import cut_rows
from titan_bridge.errors import BridgeError
from titan_bridge.memory import bytes_of
from titan_bridge.sharding.boxes import Box
from titan_bridge.sharding.moves import Window, cut

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)


@st.composite
def boxes(draw, shape):
    spans = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        spans.append((start, draw(st.integers(start + 1, size))))
    return Box(start=tuple(a for a, _ in spans), stop=tuple(b for _, b in spans))


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    shape=SHAPES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    limits=st.tuples(
        st.sampled_from([8, 64, 512]), st.sampled_from([8, 100, 10_000]), st.sampled_from([0, 20, 999])
    ),
    advice=st.sampled_from([files._POPULATE_READ, 999]),
    staged=st.booleans(),
)
def test_a_fetched_window_is_the_window_of_the_tensor(
    tmp_path_factory, data, shape, dtype, limits, advice, staged
):
    tensor = torch.arange(max(1, torch.Size(shape).numel())).reshape(shape).to(dtype)
    path = tmp_path_factory.mktemp("window") / "file"
    head = data.draw(st.integers(0, 9))
    path.write_bytes(b"x" * head + bytes(bytes_of(tensor)) + b"y" * 3)
    box = data.draw(boxes(shape))
    order = data.draw(st.permutations(range(len(shape))))
    expected = tensor[box.slices].permute(order)
    window = Window(
        size=tuple(expected.shape), stride=tuple(expected.stride()), offset=expected.storage_offset()
    )
    pool = FilePool()
    pool._scratch_for(
        torch.device("cpu")
    ).staged = staged  # by two buffers, as to a GPU, but into the same memory
    with pytest.MonkeyPatch.context() as patch:
        # Small limits, so that windows are cut in every way, and a kernel that does not know the advice.
        for name, limit in zip(("SCRATCH_BYTES", "SPAN_BYTES", "NEAR_BYTES"), limits, strict=True):
            patch.setattr(files, name, limit)
        patch.setattr(files, "_POPULATE_READ", advice)
        for wanted in (dtype, torch.float32):
            out = torch.full(expected.shape, -1).to(wanted)
            pool.fetch(path, head, dtype, window, out)
            assert torch.equal(out, expected.to(wanted))
    assert pool.bytes_read == 2 * expected.numel() * dtype.itemsize
    pool.close()


def test_what_goes_to_another_device_is_read_into_two_pinned_buffers_in_turns():
    scratch = files._Scratch(torch.device("cuda", 1))
    assert scratch.staged
    assert scratch.pinned
    scratch.pinned = False  # as far as it goes without a GPU
    first, second, third = (scratch.take(5, torch.float32).data_ptr() for _ in range(3))
    assert first == third != second


@settings(max_examples=200, deadline=None)
@given(data=st.data(), shape=SHAPES, most=st.integers(1, 60))
def test_strips_tile_a_box_and_are_small_and_contiguous(data, shape, most):
    box = data.draw(boxes(shape))
    seen = torch.zeros(shape, dtype=torch.int64)
    for strip in cut_rows(box, 1, most):
        assert strip.numel <= most or strip.numel == 1
        part = torch.arange(box.numel).reshape(box.shape)[strip.relative_to(box.start).slices]
        assert part.is_contiguous()
        seen[strip.slices] += 1
    expected = torch.zeros(shape, dtype=torch.int64)
    expected[box.slices] = 1
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "..", "a\0b", "..\\x", 3, None])
def test_names_that_leave_the_directory_are_refused(name):
    with pytest.raises(BridgeError, match=r"it names|names the file"):
        inside(Path("/data"), name, "it")


def test_a_file_that_ends_early_is_an_error(tmp_path):
    (tmp_path / "f").write_bytes(b"1234")
    with pytest.raises(BridgeError, match="truncated"):
        FilePool().read_into(tmp_path / "f", 2, memoryview(bytearray(3)))


def test_a_file_that_ends_between_runs_is_an_error(tmp_path):
    (tmp_path / "f").write_bytes(bytes(4 * 10 - 3))
    window = Window(size=(4, 5), stride=(10, 1), offset=5)  # the right half of [4, 10]
    with pytest.raises(BridgeError, match="ends at byte 37; 40 were expected: truncated"):
        FilePool().fetch(tmp_path / "f", 0, torch.uint8, window, torch.empty(4, 5, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # as in the file, and cast
def test_gaps_between_runs_are_not_read(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(files, "NEAR_BYTES", 0)
    whole = torch.randn(64, 1024).to(torch.bfloat16)
    (tmp_path / "f").write_bytes(bytes(bytes_of(whole)))
    out, pool = torch.empty(64, 256, dtype=dtype), FilePool()

    def read_by_the_process() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    itself = -read_by_the_process() + read_by_the_process()
    before = read_by_the_process()
    pool.fetch(tmp_path / "f", 0, torch.bfloat16, Window(size=(64, 256), stride=(1024, 1), offset=256), out)
    told = read_by_the_process() - before - itself
    assert abs(told - pool.bytes_read) < 16  # the file of counters is longer when a number gets another digit
    assert pool.bytes_read == whole.nbytes // 4
    assert torch.equal(out, whole[:, 256:512].to(dtype))


@pytest.mark.parametrize("columns", [1024, 8192])  # runs closer than a page, and farther apart
def test_runs_that_lie_near_each_other_are_mapped_a_part_at_a_time(tmp_path, columns, monkeypatch):
    seen, real = [], mmap.mmap
    monkeypatch.setattr(files, "SPAN_BYTES", 200_000)
    monkeypatch.setattr(
        files.mmap, "mmap", lambda fd, length, **how: seen.append(length) or real(fd, length, **how)
    )
    whole = torch.randn(256, columns).to(torch.bfloat16)
    (tmp_path / "f").write_bytes(b"12" + bytes(bytes_of(whole)))
    out, pool = torch.empty(256, columns // 2, dtype=torch.bfloat16), FilePool()
    window = Window(size=(256, columns // 2), stride=(columns, 1), offset=columns // 2)
    pool.fetch(tmp_path / "f", 2, torch.bfloat16, window, out)
    assert torch.equal(out, whole[:, columns // 2 :])
    assert pool.bytes_read == whole.nbytes // 2
    assert len(seen) == -(-256 // (100_000 // columns))
    assert max(seen) <= 200_000 + mmap.ALLOCATIONGRANULARITY


def test_many_files_stay_within_the_limit_of_open_ones(tmp_path):
    pool = FilePool()
    for i in range(200):
        (tmp_path / str(i)).write_bytes(bytes([i]))
    for _ in range(2):
        for i in range(200):
            out = bytearray(1)
            pool.read_into(tmp_path / str(i), 0, memoryview(out))
            assert out[0] == i
    assert len(pool._files) <= files._OPEN_FILES
    pool.close()


def test_a_pool_that_nobody_closes_keeps_no_file_open(tmp_path):
    before = os.listdir("/proc/self/fd")
    (tmp_path / "a").write_bytes(b"weights!")
    out = bytearray(8)
    for _ in range(3):
        FilePool().read_into(tmp_path / "a", 0, memoryview(out))
        assert out == b"weights!"
    assert os.listdir("/proc/self/fd") == before


@settings(deadline=None)
@given(
    size=st.lists(st.integers(0, 7), max_size=4),
    most=st.integers(1, 40),
    gaps=st.booleans(),
    data=st.data(),
)
def test_parts_of_an_array_hold_each_element_once_and_no_more_than_they_may(size, most, gaps, data):
    place = data.draw(st.permutations(range(len(size))))  # how the dims lie in memory, the innermost first
    stride, step = [0] * len(size), 1
    for dim in place:
        stride[dim] = step
        step *= max(size[dim], 1) + data.draw(st.integers(0, 2))
    window = Window(size=tuple(size), stride=tuple(stride), offset=3)
    seen = torch.zeros(size)
    for index in cut(window.size, window.order, most, window.stride if gaps else None):
        part = window.at(index)
        seen[index] += 1
        assert part.size == tuple(seen[index].shape)
        elements = math.prod(part.size)
        span = 1 + sum((n - 1) * by for n, by in zip(part.size, part.stride, strict=True))
        assert elements == 1 or (span if gaps else elements) <= most
        first = [each.start for each in index]
        assert part.offset == 3 + sum(n * by for n, by in zip(first, stride, strict=True))
    assert bool((seen == 1).all())
