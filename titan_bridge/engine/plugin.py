"""The vLLM plugin: what every vLLM process runs before it reads a model.

vLLM loads general plugins in the API server, the engine core, each worker and the model-inspection
subprocess, and it logs and swallows whatever a plugin raises. So `register` does three cheap things, never
raises for a version it does not know, and leaves every check that can fail to the moment when somebody asks
for `model_impl="torchtitan"`. torchtitan is not imported here.
"""

from __future__ import annotations


def register() -> None:
    """Teach vLLM's registry about `model_impl="torchtitan"`. Idempotent; a few milliseconds."""
    # Here, so that importing the entry point alone imports no vLLM.
    from titan_bridge.engine.patches import upstream  # noqa: PLC0415

    upstream.install()
