"""Live weights start as zeros that take no memory until something is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titan_bridge.engine.cpu.pages import zeros_like


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (1000, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zeros_of_the_shape_and_dtype(shape, dtype):
    made = zeros_like(torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))
    assert (made.shape, made.dtype, made.device.type) == (torch.Size(shape), dtype, "cpu")
    assert made.is_contiguous()
    assert made.data_ptr() % 64 == 0
    assert not made.any()


def test_memory_is_taken_when_it_is_written():
    size = 256 << 20
    before = resident()
    made = zeros_like(torch.empty(size // 2, dtype=torch.bfloat16, device="meta"), torch.device("cpu"))
    assert resident() - before < size // 8
    made.fill_(1)
    assert resident() - before > size // 8 * 7


FREED = """
import threading
import torch
from pathlib import Path
from titan_bridge.cpu import keep_freed_memory
from titan_bridge.engine.cpu.pages import zeros_like

def resident():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def make():
    held = [zeros_like(torch.empty(1 << 17, dtype=torch.uint8, device="meta"), torch.device("cpu")) for _ in range(200)]
    for tensor in held:
        tensor.fill_(1)
    everyone.wait()  # threads that live at once have heaps of their own

torch.set_num_threads(1)
assert keep_freed_memory()
everyone = threading.Barrier(6)
threads = [threading.Thread(target=make) for _ in range(6)]
before = resident()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(resident() - before)
"""


def test_what_threads_have_freed_goes_back_to_the_kernel():
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    command = [sys.executable, "-c", FREED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 30 << 20  # of 150 MB
