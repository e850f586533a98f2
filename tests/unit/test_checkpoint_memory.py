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
source, base = Path(sys.argv[1]), Path(sys.argv[2])
before, peaks, written = peak(), [], []
for to, at in (('dcp', source), ('hf', base / 'dcp')):
    written.append(prepare(Options(source=at, target=base / to, to=to, workers=2)).run().bytes_written)
    peaks.append(peak() - before)
heavy = [m for m in ('vllm', 'transformers', 'torchtitan', 'torch.distributed.tensor') if m in sys.modules]
print(json.dumps([peaks, written, heavy]))
"""


def measure(source: Path, base: Path) -> tuple[list[int], list[int]]:
    """Into DCP, and back from it: peaks of memory over the imports, bytes written. Nothing heavy is imported."""
    out = subprocess.run(
        [sys.executable, "-c", _MEASURE, source, base], capture_output=True, text=True, check=True
    ).stdout
    peaks, written, loaded = json.loads(out)
    assert loaded == []
    return peaks, written


@pytest.mark.slow
def test_four_times_the_model_needs_no_more_memory(tmp_path):
    results = []
    for layers in (5, 25):
        base = tmp_path / f"{layers}"
        source = make_checkpoint(
            base / "source", "llama3", tokenizer=False, num_hidden_layers=layers, **SHAPE
        )
        results.append(measure(source, base))
        shutil.rmtree(base)
    (small, small_bytes), (large, large_bytes) = results
    for i in range(2):
        assert large_bytes[i] > 3.8 * small_bytes[i]
        assert large[i] < 1e9
        assert large[i] - small[i] < 4 * STRIP_BYTES  # a thread more or less at the peak


def test_neither_vllm_nor_transformers_nor_torchtitan_nor_dtensor_is_imported(tmp_path):
    measure(make_checkpoint(tmp_path / "moe", "qwen3_moe", tokenizer=False), tmp_path)


def test_the_command_is_imported_in_no_time():
    """What `titan-bridge reshard --help` needs; torch comes with the work."""
    check = "import sys, titan_bridge.commands.reshard as c; assert 'torch' not in sys.modules and c.Reshard.__doc__"
    subprocess.run([sys.executable, "-c", check], check=True)
