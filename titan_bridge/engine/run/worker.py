"""Methods that every vLLM worker gets through `worker_extension_cls`, called with `collective_rpc("bridge_report")`."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.distributed.tensor import DTensor

from titan_bridge.sharding.layout import dtype_name

WORKER_EXTENSION = "titan_bridge.engine.run.worker.BridgeWorker"


class BridgeWorker:
    """Mixed into vLLM's worker class; adds methods only, and answers in plain types, so that RPC can carry them."""

    def bridge_report(self) -> dict[str, Any]:
        """What this worker serves: rank, class, dtype, sizes, parameters and bytes that it holds, bytes that it read.

        `model_class` is the class that vLLM loaded, `inner_class` the TorchTitan module inside it, `sizes` the parallel
        degrees, `stage` that of the pipeline, `attention` its form and cache in words, `loaded` the fields of
        `checkpoint.load.Loaded` (None where our loader did not read the weights); all but the first are None for vLLM's
        own models.
        """
        model = self.get_model()  # type: ignore[attr-defined]  # the worker's
        setup = getattr(model, "setup", None)
        inner = getattr(model, "model", None) if setup is not None else None
        loaded = getattr(model, "loaded", None) if setup is not None else None
        # What vLLM's attention derives from weights, it keeps as parameters.
        weights = [p for name, p in model.named_parameters() if ".inner_attention." not in name]
        parameters = [p.to_local() if isinstance(p, DTensor) else p for p in weights]
        return {
            "rank": self.rank,  # type: ignore[attr-defined]
            "dtype": dtype_name(self.model_config.dtype),  # type: ignore[attr-defined]
            "model_class": _name(_ours(type(model))),
            "inner_class": None if inner is None else _name(type(inner)),
            "sizes": None if setup is None else setup.sizes.axes,
            "stage": None if setup is None else model.stage,
            "attention": None if setup is None else model.attention,
            "local_parameters": sum(p.numel() for p in parameters),
            "loaded": None if loaded is None else dataclasses.asdict(loaded),
            "local_bytes": sum(p.numel() * p.element_size() for p in parameters),
        }


def _ours(cls: type) -> type:
    """Our class where vLLM has made another of it, for embeddings; else the class itself."""
    return next((base for base in cls.__mro__ if base.__module__.startswith("titan_bridge.")), cls)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
