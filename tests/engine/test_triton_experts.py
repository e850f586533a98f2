"""Routed experts by vLLM's Triton kernel against TorchTitan's own, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `triton_interpreter.py` prints; a process of its own, because vLLM looks for Triton when it is imported."""
    command = [sys.executable, "-m", "tests.engine.triton_interpreter"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_kernel_is_vllms_own(found: dict[str, Any]) -> None:
    assert found["kernel"] == "InterpretedFunction"


@pytest.mark.parametrize("tokens", [0, 1, 5, 70])  # of 1, the kernel gets the experts of rows as they are
@pytest.mark.parametrize("own", ["all", "own"])
@pytest.mark.parametrize("kind", ["swiglu", "gpt-oss"])
def test_experts_by_the_kernel_are_torchtitans(
    found: dict[str, Any], kind: str, own: str, tokens: int
) -> None:
    assert found[f"{kind}, {own}, torch.float32, {tokens}"]["ours"] <= 1e-6
    rounded = found[f"{kind}, {own}, torch.float16, {tokens}"]
    assert rounded["ours"] <= max(1.5 * rounded["theirs"], 1e-3)


@pytest.mark.parametrize("kind", ["swiglu", "gpt-oss"])
def test_rows_that_come_sorted_by_expert(found: dict[str, Any], kind: str) -> None:
    assert found[f"{kind}, sorted"] <= 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_a_graph_holds_the_kernel() -> None:
    command = [sys.executable, "scripts/gpu_parts.py", "operators", ".", "cuda"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
