"""Live weights start as zeros, in huge pages where the machine has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from titan_bridge.engine.pages import zeros_like


def flags_at(address: int) -> list[str]:
    """Linux's flags of the mapping that holds an address."""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            head = line.split(maxsplit=1)[0]
            if "-" in head and not head.endswith(":"):
                low, high = (int(part, 16) for part in head.split("-"))
                inside = low <= address < high
            elif inside and head == "VmFlags:":
                return line.split()[1:]
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (1000, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zeros_of_the_shape_and_dtype(shape, dtype):
    made = zeros_like(torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))
    assert (made.shape, made.dtype, made.device.type) == (torch.Size(shape), dtype, "cpu")
    assert made.is_contiguous()
    assert not made.any()


def test_large_tensors_are_advised_and_their_neighbours_are_not():
    large = zeros_like(torch.empty(8 << 20, dtype=torch.uint8, device="meta"), torch.device("cpu"))
    small = zeros_like(torch.empty(1 << 10, dtype=torch.uint8, device="meta"), torch.device("cpu"))
    supported = Path("/sys/kernel/mm/transparent_hugepage").is_dir()
    assert ("hg" in flags_at(large.data_ptr() + (4 << 20))) == supported
    assert "hg" not in flags_at(small.data_ptr())
