"""Checkpoints that several files of tests read, and nobody writes to; no server in a test's own process."""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis
import pytest

from tests.unit.checkpoint_samples import SMALL
from titan_bridge.checkpoint.reshard import Options, prepare
from titan_bridge.testing import make_checkpoint

hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no mistake
hypothesis.settings.load_profile("tests")


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


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `serve` fail where it would begin to answer: uvloop takes the signals that end a test which hangs."""
    monkeypatch.setitem(sys.modules, "titan_bridge.engine.run.server", None)
