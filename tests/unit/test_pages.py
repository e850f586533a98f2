"""Live weights start as zeros that take no memory until something is written."""

from __future__ import annotations

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
