"""The example in the help of `generate` runs as it is printed; that of `parity` is a case of test_parity.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.unit.test_examples import words_of
from titan_bridge.commands.quiet import STAGES
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]


def test_generate(bin_dir: Path, tmp_path: Path, no_orphans: None) -> None:
    make_checkpoint(tmp_path / "out/demo/qwen3_moe", "qwen3_moe", dtype=torch.float32)
    program = str(bin_dir / "titan-bridge")
    printed = subprocess.run([program, "generate", "--help"], capture_output=True, text=True, check=True)
    done = subprocess.run(
        [program, *words_of(printed.stdout)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--- 'def main'\n" in done.stdout
    assert "\nclass   titan_bridge.engine.model.wrapper.TitanForCausalLM (" in done.stdout
    assert "\nmesh    dp_replicate=1 fsdp=1 tp=2 efsdp=1 ep=2\n" in done.stdout
    assert "\ndtype   bfloat16 (the checkpoint's: float32)\n" in done.stdout
    stages = ["importing vLLM to run out/demo/qwen3_moe", *STAGES.values()]
    told = [line.removeprefix("titan-bridge: ") for line in done.stderr.splitlines()]
    assert told == [stage for stage in stages if stage in told]  # a stage of a moment may be passed over
    assert len(told) >= 3
    assert told[-1] == stages[-1]
