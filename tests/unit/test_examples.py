"""The example in each command's help runs as it is printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from titan_bridge import cli
from titan_bridge.checkpoint.job import Options
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.ports import free_port
from titan_bridge.testing import make_checkpoint

ROOT = Path(__file__).parents[2]
STOPS = {"serve": ["--dry-run"], "train": ["--print-config"]}
"""What is added where the example would start a server or a training run."""
ENGINE = ("generate", "parity")
"""Commands whose examples tests/engine/test_examples.py runs."""


def words_of(help_text: str) -> list[str]:
    """The words of the example after "titan-bridge" in what `--help` prints."""
    (line,) = re.findall(r"^ *Example: titan-bridge (.+?) *$", help_text, re.MULTILINE)
    return shlex.split(line)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the demo leaves one, with small models."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "configs", folder / "configs")
    model = make_checkpoint(folder / "out/demo/qwen3_moe", "qwen3_moe")
    prepare(Options(source=model, target=folder / "out/demo/qwen3_moe_ep2", to="dcp")).run()
    return folder


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name not in ENGINE])
def test_the_example_in_the_help_runs_as_it_is_printed(
    command: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    printed = capsys.readouterr().out
    assert "None" not in printed
    words = words_of(printed)
    if command == "plan":  # what its help says to do first
        assert cli.main(["inspect", "out/demo/qwen3_moe", "--tp", "2", "--ep", "2", "--json"]) == 0
        Path("serve.json").write_text(capsys.readouterr().out)
    if command == "serve":
        words[words.index("--port") + 1] = str(free_port())
    assert cli.main([*words, *STOPS.get(command, [])]) == 0, capsys.readouterr().err
    for picture in (word for word in words if word.endswith(".svg")):
        assert os.path.getsize(picture) > 1000
