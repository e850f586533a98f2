"""The memory of a run does not grow with the model, and the command starts with torch and little more."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from titan_bridge.checkpoint.target import STRIP_BYTES
from titan_bridge.testing import make_checkpoint

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "head_dim": 64,
    "num_attention_heads": 16,
    "vocab_size": 8192,
}

_MEASURE = """
import json, sys
def peak():
    for line in open('/proc/self/status'):
        if line.startswith('VmHWM'):
            return int(line.split()[1]) * 1024
from titan_bridge.checkpoint.reshard import Options, prepare
from pathlib import Path
source, target, to = json.loads(sys.argv[1])
before = peak()
outcome = prepare(Options(source=Path(source), target=Path(target), to=to, workers=2)).run()
heavy = [m for m in ('vllm', 'transformers', 'torchtitan', 'torch.distributed.tensor') if m in sys.modules]
print(json.dumps([peak() - before, outcome.bytes_written, heavy]))
"""


def measure(source: Path, target: Path, to: str) -> tuple[int, int]:
    """(peak memory over the imports, bytes written). Nothing heavy is imported."""
    argument = json.dumps([str(source), str(target), to])
    out = subprocess.run(
        [sys.executable, "-c", _MEASURE, argument], capture_output=True, text=True, check=True
    ).stdout
    used, written, loaded = json.loads(out)
    assert loaded == []
    return used, written


@pytest.mark.slow
def test_four_times_the_model_needs_no_more_memory(tmp_path):
    results = []
    for layers in (5, 25):
        source = make_checkpoint(
            tmp_path / f"{layers}", "llama3", tokenizer=False, num_hidden_layers=layers, **SHAPE
        )
        forth = measure(source, tmp_path / f"{layers}-dcp", "dcp")
        back = measure(tmp_path / f"{layers}-dcp", tmp_path / f"{layers}-back", "hf")
        results.append((forth, back))
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
    for (small, small_bytes), (large, large_bytes) in zip(*results, strict=True):
        assert large_bytes > 3.8 * small_bytes
        assert large < 1e9
        assert large - small < 2 * STRIP_BYTES  # a thread more or less at the peak


def test_neither_vllm_nor_transformers_nor_torchtitan_nor_dtensor_is_imported(tmp_path):
    source = make_checkpoint(tmp_path / "moe", "qwen3_moe", tokenizer=False)
    measure(source, tmp_path / "dcp", "dcp")
    measure(tmp_path / "dcp", tmp_path / "hf", "hf")


def test_the_command_is_imported_in_no_time():
    """What `titan-bridge reshard --help` needs; torch comes with the work."""
    check = "import sys, titan_bridge.commands.reshard as c; assert 'torch' not in sys.modules and c.Reshard.__doc__"
    subprocess.run([sys.executable, "-c", check], check=True)
