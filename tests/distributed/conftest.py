"""Ranks and workers, forked from one process that all tests of this folder share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import pytest

from tests.distributed.transfer_parties import OLD, begin_anew, layout
from titan_bridge.engine.cpu import forking
from titan_bridge.sharding.layout import Layout
from titan_bridge.testing_processes import PlainClient, PlainRanks, forked, plain_ranks, plain_workers
from titan_bridge.testing_samples import sample_target

_shared = contextlib.ExitStack()
"""Not the session's: engines fork their processes from another server, and a process can have one."""


@functools.cache
def _server() -> None:
    forking.stop()
    _shared.enter_context(forked("titan_bridge.train.worker"))


@functools.cache
def _ranks(count: int) -> PlainRanks:
    return _shared.enter_context(plain_ranks(count))


@functools.cache
def _pair() -> PlainClient:
    nothing = Layout(meshes={}, params={}).to_json()
    return _shared.enter_context(plain_workers(sample_target, [(nothing, rank, rank, 0) for rank in (0, 1)]))[
        0
    ]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path.parent != item.path.parent:
        for started in (_server, _ranks, _pair):
            started.cache_clear()
        _shared.close()


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """What is forked has TorchTitan's trainer imported."""
    _server()


@pytest.fixture
def ranks() -> PlainRanks:
    """Four ranks for jobs that end none of them."""
    return _ranks(4)


@pytest.fixture
def new_ranks() -> Iterator[PlainRanks]:
    """Four ranks for one test: DTensor's caches remember meshes, whose groups end with a job."""
    with plain_ranks(4) as ranks:
        yield ranks


@pytest.fixture
def pair() -> PlainClient:
    """Two workers that hold nothing; `retarget` gives them something."""
    return _pair()


@pytest.fixture
def trainers() -> PlainRanks:
    """Two ranks that send to `workers`."""
    return _ranks(2)


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[PlainClient, list]]:
    with plain_workers(sample_target, [(layout(2, 1), rank, rank, OLD) for rank in range(2)]) as started:
        yield started


@pytest.fixture
def workers(processes: tuple[PlainClient, list]) -> PlainClient:
    """Two workers with the OLD weights, connected with nobody."""
    processes[0].call(begin_anew, layout(2, 1))
    return processes[0]


@pytest.fixture
def mortal() -> Iterator[PlainRanks]:
    """Trainer ranks that a test may kill."""
    with plain_ranks(2) as ranks:
        yield ranks
