"""Tell TorchTitan that this machine computes on its CPU when it has no accelerator.

TorchTitan falls back to ``"cuda"`` when it finds no accelerator, and several of its modules copy that name
when they are imported; ``DeviceMesh`` and DTensor's random state then fail with "not compiled with CUDA".
"""

from __future__ import annotations

import sys

import torch
import torchtitan.tools.utils as titan_utils


def use_cpu_if_no_accelerator() -> str:
    """Make TorchTitan's device ``"cpu"`` on a machine without an accelerator, else change nothing.

    Corrects the original and every copy in a TorchTitan module that is already loaded, so it may be called
    before or after other TorchTitan imports, and again after new ones.

    Returns:
        The device type that TorchTitan now uses, for instance ``"cuda"`` or ``"cpu"``.
    """
    if torch.accelerator.is_available():
        return titan_utils.device_type
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan.") and getattr(module, "device_type", None) == "cuda":
            vars(module)["device_type"] = "cpu"
            if hasattr(module, "device_module"):
                vars(module)["device_module"] = torch.cpu
    return titan_utils.device_type
