"""One product for both matrices up of a dense MLP: `w1` and `w3` are halves of one piece of memory.

Both stay parameters of their own, contiguous, under their names, so that whatever writes weights in place sees no
difference. On CPUs bfloat16 has packed copies instead (`cpu/packed.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.models.common.feed_forward import FeedForward

from titan_bridge.engine.cpu.pages import zeros_like


class JoinedFeedForward(FeedForward):
    """TorchTitan's `FeedForward` over joined memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., D)` to `(..., D)`."""
        gate, up = F.linear(x, self.__dict__["_up_GD"]).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


def join_up(model: nn.Module, device: torch.device) -> None:
    """Make TorchTitan's plain MLPs of `model`, still on meta, joined ones with memory on `device`."""
    for module in model.modules():
        if type(module) is not FeedForward or module.w1.bias is not None or module.w3.bias is not None:
            continue
        # Their own forwards are not called, so they must have no collective to run.
        assert "forward" not in module.w1.__dict__
        assert "forward" not in module.w3.__dict__
        hidden, dim = module.w1.weight.shape
        up_GD = zeros_like(module.w1.weight.new_empty(2 * hidden, dim), device)
        for linear, half_FD in zip((module.w1, module.w3), up_GD.split(hidden), strict=True):
            linear.weight = nn.Parameter(half_FD, requires_grad=False)
        module.__class__ = JoinedFeedForward
        module.__dict__["_up_GD"] = up_GD
