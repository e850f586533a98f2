"""Processes that a test leaves behind, and a test that nothing interrupts, in runs of pytest of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
LEAVES = """
import subprocess, conftest
conftest.GRACE_SECONDS = {grace}
def test_it(no_orphans):
    subprocess.Popen(["sleep", "{seconds}"])
"""
HANGS = """
import time, pytest, conftest
conftest.BACKSTOP_SECONDS = 0.5
@pytest.mark.timeout(0.5)
def test_it():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


def run(test: str, folder: Path) -> subprocess.CompletedProcess[str]:
    shutil.copy(CONFTEST, folder)
    (folder / "test_one.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, folder]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=60)


@pytest.mark.parametrize(
    ("seconds", "grace", "word"), [("0.7", "20", "1 passed in"), ("60", "0.5", "left alive: ['sleep 60']")]
)
def test_a_process_that_is_ending_may_end_and_one_that_stays_fails_the_test(
    seconds: str, grace: str, word: str, tmp_path: Path
) -> None:
    done = run(LEAVES.format(grace=grace, seconds=seconds), tmp_path)
    assert word in done.stdout, done.stdout + done.stderr


def test_a_test_that_swallows_its_timeout_ends_the_run(tmp_path: Path) -> None:
    done = run(HANGS, tmp_path)
    assert done.returncode == 1
    assert "test_one.py::test_it goes on without them; ending pytest" in done.stderr
    assert "in test_it" in done.stderr
