"""Processes for the tests of what goes wrong in a transfer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.transfer_parties import OLD, begin_anew, layout
from titan_bridge.testing_processes import PlainClient, PlainRanks, plain_ranks, plain_workers
from titan_bridge.testing_samples import sample_target


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


@pytest.fixture(scope="module")
def trainers() -> Iterator[PlainRanks]:
    with plain_ranks(2) as ranks:
        yield ranks
