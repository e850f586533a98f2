"""`scripts/bench_tables.py` writes what a measurement says into a page, and nothing else of the page changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

PAGE = "before\n<!-- serving: made by scripts/bench_tables.py -->\nold\n<!-- /serving -->\nafter\n"


def side(token: float) -> dict[str, list[float]]:
    """Three starts around `token` milliseconds."""
    return {
        "per token, ms": [token, token * 9, token * 0.9],
        "first token, ms": [300.0] * 3,
        "start, s": [20.0] * 3,
        "tokens/s": [90.0] * 3,
    }


def measured(case: str, sides: dict[str, Any]) -> dict[str, Any]:
    about = {
        "machine": "a processor",
        "versions": {"vllm": "0.32.0"},
        "date": "2026-01-02",
        "commit": "abc123",
    }
    return {
        "case": case, "model": "moe", "tp": 2, "eager": True, "batch": 8, "starts": 3, "sides": sides, "about": about,
    }  # fmt: skip


def write(folder: Path, *files: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    names = [folder / f"{number}.json" for number in range(len(files))]
    for name, rows in zip(names, files, strict=True):
        name.write_text(json.dumps({"rows": rows}))
    options = ["--page", folder / "page.md", "--chart", folder / "chart.svg"]
    command = [sys.executable, ROOT / "scripts/bench_tables.py", *names, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path


def test_a_row_says_what_the_first_side_has_that_others_have_not(folder: Path) -> None:
    rows = [
        measured(name, {f"torchtitan{name}": side(10.0), "torchtitan": side(10.0)})
        for name in (" ep", " latent")
    ]
    assert write(folder, rows).returncode == 0
    page = (folder / "page.md").read_text()
    assert "| moe, tp=2 ep=2, eager, batch 8 | the same without ep |" in page
    assert "| moe latent, tp=2, eager, batch 8 | the same without latent |" in page
    assert page.count("a processor; vllm 0.32.0; 2026-01-02, commit abc123.") == 1


def test_the_table_and_the_chart_have_medians_and_say_where_they_come_from(folder: Path) -> None:
    sides = {"torchtitan": side(10.0), "vllm": side(15.0), "transformers": {"error": "ValueError: no"}}
    older = [measured("a", {"torchtitan": side(1.0), "vllm": side(1.0)})]
    done = write(folder, older, [measured("a", sides)])
    assert done.returncode == 0, done.stderr
    page = (folder / "page.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("<!-- /serving -->\nafter\n")
    assert "old" not in page
    assert "| moe, tp=2, eager, batch 8 | vllm | 3 | **1.50** (10 / 15) |" in page
    assert "does not run: ValueError: no" in page
    assert "a processor; vllm 0.32.0; 2026-01-02, commit abc123." in page
    chart = (folder / "chart.svg").read_text()
    assert chart.count("against vllm") == 1
    assert "1.50" in chart
    assert "against transformers" not in chart

    assert write(folder, [measured("a", sides)]).returncode == 0
    assert ((folder / "page.md").read_text(), (folder / "chart.svg").read_text()) == (page, chart)


def test_what_was_compared_at_another_time_stands_beside_it_and_what_is_newer_replaces(folder: Path) -> None:
    ours = {"torchtitan": side(10.0)}
    first = [
        measured("a", ours | {"vllm": side(15.0), "transformers": side(99.0)}),
        measured("b", ours | {"vllm": side(12.0)}),
    ]
    second = [measured("a", {"torchtitan": side(20.0), "transformers": side(50.0)})]
    assert write(folder, first, second).returncode == 0
    lines = [line for line in (folder / "page.md").read_text().splitlines() if line.startswith("| moe")]
    assert [line.split("|")[2:5] for line in lines] == [
        [" vllm ", " 3 ", " **1.50** (10 / 15) "],
        [" transformers ", " 3 ", " **2.50** (20 / 50) "],
        [" vllm ", " 3 ", " **1.20** (10 / 12) "],
    ]


def test_a_page_without_the_markers_stays(folder: Path) -> None:
    (folder / "page.md").write_text("nothing")
    done = write(folder, [measured("a", {"torchtitan": side(1.0), "vllm": side(1.0)})])
    assert done.returncode == 2
    assert "has no lines" in done.stderr
    assert [path.name for path in sorted(folder.iterdir())] == ["0.json", "page.md"]


def test_our_own_page_has_the_markers() -> None:
    page = (ROOT / "scripts/README.md").read_text()
    assert (
        page.count("<!-- serving: made by scripts/bench_tables.py -->")
        == page.count("<!-- /serving -->")
        == 1
    )
