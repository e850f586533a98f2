"""Checkpoints that several files of tests read; nobody writes to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.checkpoint_samples import SMALL
from titan_bridge.checkpoint.reshard import Options, prepare
from titan_bridge.testing import make_checkpoint


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("faults") / "hf", "qwen3_moe", max_shard_size="60KB", tokenizer=False, **SMALL
    )


@pytest.fixture(scope="session")
def dcp_source(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "dcp"
    prepare(Options(source=source, target=path, to="dcp", max_shard_size=60_000)).run()
    return path
