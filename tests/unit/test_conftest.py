"""The fixture that finds processes which a test leaves behind, in runs of pytest of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TEST = """
import subprocess, conftest
conftest.GRACE_SECONDS = {grace}
def test_it(no_orphans):
    subprocess.Popen(["sleep", "{seconds}"])
"""


@pytest.mark.parametrize(
    ("seconds", "grace", "word"), [("0.7", "20", "1 passed in"), ("60", "0.5", "left alive: ['sleep 60']")]
)
def test_a_process_that_is_ending_may_end_and_one_that_stays_fails_the_test(
    seconds: str, grace: str, word: str, tmp_path: Path
) -> None:
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_one.py").write_text(TEST.format(grace=grace, seconds=seconds))
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert word in done.stdout, done.stdout + done.stderr
