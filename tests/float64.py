"""TorchTitan's forward in float64: tells which of two float32 results is nearer to the right one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from titan_bridge import parity
from titan_bridge.reference import load_reference


class _Float64(TorchFunctionMode):
    """What a module computes in float32 whatever its dtype is (router, softmax, rotation) it computes in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {
            name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def referee(model: Path) -> parity.Logprobs:
    """Log-probabilities `(L, V)` in float64 of a checkpoint; rope tables are TorchTitan's, in float32."""
    reference = load_reference(model, dtype=torch.float64)

    def logprobs(token_ids: Sequence[int]) -> torch.Tensor:
        with _Float64():
            logits_LV = reference.logits(token_ids)
            assert logits_LV.dtype == torch.float64
            return logits_LV.log_softmax(-1)

    return logprobs


def errors(
    completions: Sequence[dict[str, Any]], float32: parity.Logprobs, float64: parity.Logprobs
) -> tuple[parity.Difference, parity.Difference]:
    """How far from float64 an engine's log-probabilities are, and a float32 reference's of the same tokens."""
    theirs = []
    for completion in completions:
        prompt, new = completion["prompt_token_ids"], completion["token_ids"]
        key = [*prompt, *new]
        chosen = float32(key)[torch.arange(len(key) - 1), key[1:]].tolist()
        at = len(prompt) - 1
        theirs.append({**completion, "prompt_logprobs": [None, *chosen[:at]], "logprobs": chosen[at:]})
    served, own = (parity.compare(each, "float64", float64) for each in (completions, theirs))
    assert served.tokens == own.tokens
    return served, own
