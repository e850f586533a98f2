"""What the fork server imports: all that an engine and a worker need, TorchTitan and our own classes included.

Nothing here may start a thread or open a device. What does not import is left to the process that needs it, whose
error then names the reason.
"""

from __future__ import annotations

import contextlib
import gc
import importlib

with contextlib.suppress(Exception):  # first, since some patches wait for the imports that follow
    importlib.import_module("titan_bridge.engine.plugin").register()

for _name in (
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "titan_bridge.engine.model.wrapper",
    "titan_bridge.engine.loading.model_loader",
):
    with contextlib.suppress(Exception):
        importlib.import_module(_name)

with contextlib.suppress(
    ImportError
):  # with which vLLM names processes; it finds its place in a fresh one only
    importlib.import_module("setproctitle").getproctitle()

gc.freeze()  # so that collections in the forked processes do not copy these pages
