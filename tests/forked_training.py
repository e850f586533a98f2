"""`titan-bridge train` in this process, without the start of an interpreter for each rank."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from titan_bridge.engine.cpu import forking
from titan_bridge.ports import free_port
from titan_bridge.testing_processes import forked
from titan_bridge.train import launch
from titan_bridge.train.build import Job


@contextlib.contextmanager
def forked_training() -> Iterator[None]:
    """What torchrun does, ranks do that are forked from a process with TorchTitan's trainer imported."""

    def run(job: Job, folder: Path, descriptor: int, begin: int) -> None:
        port = free_port()
        ranks = [
            processes.Process(target=_rank, args=(rank, job.nproc, port, str(folder), begin))
            for rank in range(job.nproc)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0] * job.nproc, "".join(
            log.read_text() for log in sorted((job.out / "logs").glob("*.log"))
        )

    forking.stop()  # an engine's server has imported other things
    with forked("titan_bridge.train.worker") as processes, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_torchrun", run)
        yield


def _rank(rank: int, world: int, port: int, folder: str, begin: int) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1}
    os.environ.update({name: str(value) for name, value in own.items()})
    from titan_bridge.train import worker  # the test's own process needs no trainer

    sys.exit(worker.main(folder, str(begin)))
