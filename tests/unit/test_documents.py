"""What README.md and its neighbours name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from titan_bridge import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for folder in (".", ".github", "configs", "scripts", "titan_bridge")
    for path in (ROOT / folder).glob("*.md" if folder in (".", ".github") else "**/README.md")
)


def heading(line: str) -> str:
    """The anchor that a heading has on a page."""
    return re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / document).read_text()):
        path, _, anchor = target.partition("#")
        page = (ROOT / document).parent / path if path else ROOT / document
        assert page.exists(), target
        if anchor:
            lines = page.read_text().splitlines()
            assert anchor in {heading(line) for line in lines if line.startswith("#")}, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_scripts_tests_and_configs_that_are_named_exist(document: Path) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(r"\b((?:scripts|configs|tests)/[\w/]*\w\.(?:py|sh|toml))", text)
    assert [name for name in named if not (ROOT / name).exists() and "NAME" not in name] == []


def test_files_of_the_upgrade_table_exist() -> None:
    rows = [
        line
        for line in (ROOT / ".github/CONTRIBUTING.md").read_text().splitlines()
        if line.startswith("|") and "`" in line
    ]
    tests = [
        name for row in rows for name in re.findall(r"`((?:unit|distributed|engine)/test_\w+\.py)`", row)
    ]
    files = [name for row in rows for name in re.findall(r"`([\w/]+/(?:\{[\w,]+\})?[\w*]*(?:\.py)?)`", row)]
    assert len(tests) >= 15
    assert [name for name in tests if not (ROOT / "tests" / name).is_file()] == []
    for name in files:
        if name in tests:
            continue
        before, _, rest = name.partition("{")
        inside, _, after = rest.partition("}")
        for one in (before + choice + after for choice in (inside.split(",") if inside else [""])):
            assert list((ROOT / "titan_bridge").glob(one)) or list(ROOT.glob(one)), one


def test_the_readme_is_short_and_lists_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 200
    assert set(re.findall(r"^\| `titan-bridge (\w+)", text, re.MULTILINE)) == set(cli.COMMANDS)


def test_the_workflow_calls_the_scripts_that_people_call() -> None:
    steps = re.findall(r"- run: (.+)", (ROOT / ".github/workflows/test.yml").read_text())
    assert {step.split()[1] for step in steps} == {"scripts/demo.sh", "scripts/test.sh"}
