"""Files that are written in any order, past the page cache or through it."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.unit.checkpoint_samples import assert_equal, options
from titan_bridge.checkpoint import execute, output
from titan_bridge.checkpoint.output import PAGE, OutputFile, Pace, aligned
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.testing import make_checkpoint

SIZE = 24 * 2**20 + 4321
LEAST = 1 << 20


def content() -> torch.Tensor:
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("direct", [True, False, None])
@pytest.mark.parametrize("shift", [0, 1, 512])
def test_pieces_in_any_order_from_several_threads_make_the_file(
    tmp_path: Path, direct: bool | None, shift: int
) -> None:
    data = content()
    edges = sorted({0, SIZE, *random.Random(1).sample(range(SIZE), 12), 5 * PAGE, 5 * PAGE + 3 * LEAST})
    pieces = list(itertools.pairwise(edges))
    random.Random(2).shuffle(pieces)
    file = OutputFile(tmp_path / "file", SIZE, Pace(direct=direct))

    def write(piece: tuple[int, int]) -> None:
        start, stop = piece
        # As the file lies by pages, or `shift` bytes off.
        at = (start + shift) % PAGE
        memory = aligned(stop - start + at)[at:]
        memory.copy_(data[start:stop])
        file.write(start, memoryview(memory.numpy()))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, pieces))
    file.close()
    file.close()
    assert (tmp_path / "file").read_bytes() == data.numpy().tobytes()


def cached_pages(path: Path) -> int:
    """Pages of a file in the page cache."""
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        found = (ctypes.c_ubyte * -(-SIZE // PAGE))()
        start = ctypes.c_char.from_buffer(mapped)
        assert not ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(SIZE), found)
        del start
        return sum(page & 1 for page in found)


@pytest.mark.parametrize("direct", [True, False])
def test_a_direct_write_leaves_the_page_cache_alone(tmp_path: Path, direct: bool) -> None:
    pace = Pace(direct=direct)
    file = OutputFile(tmp_path / "file", SIZE, pace)
    file.write(0, memoryview(content().numpy()))
    file.close()
    pages = cached_pages(tmp_path / "file")
    # What is left of a page at the end is cached; all of it where the file system has refused.
    assert pages <= 1 if direct and pace.tries_direct else pages >= SIZE // PAGE


def test_what_a_file_system_refuses_goes_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "PAGE", 1)  # bytes that no disk takes as they lie: the kernel refuses them
    data, pace = content(), Pace(direct=True)
    file = OutputFile(tmp_path / "file", SIZE, pace)
    file.write(3, memoryview(data.numpy())[3:])
    file.write(0, memoryview(data.numpy())[:3])
    file.close()
    assert (tmp_path / "file").read_bytes() == data.numpy().tobytes()


def test_the_quicker_way_goes_on_and_the_other_is_tried_again_and_again() -> None:
    pace, ways = Pace(), []
    seconds = {True: 1.0, False: 5.0}
    for step in range(2000):
        if step == 1000:
            seconds = {True: 1.0, False: 0.2}  # who needed the memory has ended
        way = pace.direct()
        ways.append(way)
        pace.took(way, 4 << 20, seconds[way])
    assert sum(ways[:1000]) > 980
    assert sum(ways[1300:]) < 20


def test_a_pace_is_shared_by_threads() -> None:
    pace = Pace()

    def work() -> None:
        for _ in range(200):
            way = pace.direct()
            pace.took(way, 1, 1.0 if way else 2.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pace.direct()


def test_checkpoints_of_all_formats_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_LEAST", PAGE)  # whatever holds a page, as in a large model
    monkeypatch.setattr(execute, "Pace", lambda: Pace(direct=True))
    source = make_checkpoint(tmp_path / "a", "qwen3_moe", hidden_size=128, vocab_size=777)
    for step, (come, go, more) in enumerate(
        [("a", "b", {"to": "dcp"}), ("b", "c", {"to": "engine", "tp": 2, "ep": 2}), ("b", "d", {"to": "hf"})]
    ):
        outcome = prepare(
            options(
                tmp_path / come, tmp_path / go, verify=True, max_shard_size=400_000, workers=1 + step, **more
            )
        ).run()
        assert outcome.bytes_written
    assert_equal(source, tmp_path / "d")
