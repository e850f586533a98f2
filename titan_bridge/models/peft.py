"""LoRA adapters by PEFT's names and by TorchTitan's.

TorchTitan has `lora_a.weight` [r, in] and `lora_b.weight` [out, r] beside the weight of a linear layer; PEFT has
`lora_A.weight` and `lora_B.weight` beside each Hugging Face module. Where several of these are slices of one weight (q,
k and v), they share TorchTitan's A, and each has its own rows of B. Both scale the product by alpha / r; alpha is not
among the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.view import View

PREFIX = "base_model.model."
"""Before Hugging Face's names in an adapter."""
WEIGHT = ".weight"
LORA = (f".lora_a{WEIGHT}", f".lora_b{WEIGHT}")
"""How TorchTitan's names of an adapter's matrices end."""


def rows_of(view: View, columns: int) -> View:
    """The rows of a linear layer's view with other columns: a part of B `(out, columns)`."""
    return replace(
        view,
        shape=(view.shape[0], columns),
        factors=(view.factors[0], (columns,)),
        index=(*view.index[:-1], (0, columns)),
    )


def linear_views(views: Iterable[View]) -> dict[str, list[View]]:
    """The views of weights that are matrices, by TorchTitan's weight; the order is that of `views`."""
    found: dict[str, list[View]] = {}
    for view in views:
        if view.fqn.endswith(WEIGHT) and view.name.endswith(WEIGHT) and len(view.factors) == 2:
            found.setdefault(view.fqn, []).append(view)
    return found


def to_peft(tensors: Mapping[str, torch.Tensor], views: Iterable[View]) -> dict[str, torch.Tensor]:
    """TorchTitan's matrices of an adapter as PEFT's.

    Args:
        tensors: By FQN, `NAME.lora_a.weight` and `NAME.lora_b.weight`.
        views: Of the model, onto its live weights (`fused_qkv`).

    Raises:
        BridgeError: A matrix without its other half, of another shape than its layer's, or beside no weight of views.
    """
    known = linear_views(views)
    result: dict[str, torch.Tensor] = {}
    for module in sorted({_module(name) for name in tensors}):
        a, b = (tensors.get(f"{module}.lora_{which}{WEIGHT}") for which in "ab")
        parts = known.get(module + WEIGHT, [])
        if a is None or b is None:
            raise BridgeError(f"{module} has one of lora_a and lora_b; both are needed")
        if not parts or (a.shape[1], b.shape[0]) != parts[0].titan_shape[::-1] or a.shape[0] != b.shape[1]:
            raise BridgeError(
                f"{module}: matrices of {tuple(a.shape)} and {tuple(b.shape)} fit no linear layer of this model"
            )
        for view in parts:
            stem = PREFIX + view.name.removesuffix(WEIGHT)
            result[f"{stem}.lora_A{WEIGHT}"] = a.clone()
            result[f"{stem}.lora_B{WEIGHT}"] = rows_of(view, a.shape[0]).read(b).contiguous()
    return result


def from_peft(tensors: Mapping[str, torch.Tensor], views: Iterable[View]) -> dict[str, torch.Tensor]:
    """The reverse of `to_peft`.

    Raises:
        BridgeError: A tensor that belongs to no linear layer, and modules that share TorchTitan's A here and not there.
    """
    left, result = dict(tensors), {}
    for fqn, parts in linear_views(views).items():
        stems = [PREFIX + view.name.removesuffix(WEIGHT) for view in parts]
        halves = [left.pop(f"{stem}.lora_{which}{WEIGHT}", None) for which in "AB" for stem in stems]
        present = [half for half in halves if half is not None]
        if not present:
            continue
        first, shared = present[0], present[: len(parts)]
        if len(present) < len(halves) or not all(torch.equal(a, first) for a in shared):
            raise BridgeError(
                f"{', '.join(stems)} are one layer in TorchTitan, {fqn}, which has one lora_A for all of them; theirs "
                "differ, or some are missing"
            )
        rank, module = first.shape[0], fqn.removesuffix(WEIGHT)
        whole = torch.zeros(parts[0].titan_shape[0], rank, dtype=first.dtype)
        for view, b in zip(parts, present[len(parts) :], strict=True):
            rows_of(view, rank).write(whole, b)
        result |= {f"{module}.lora_a{WEIGHT}": first, f"{module}.lora_b{WEIGHT}": whole}
    if left:
        raise BridgeError(f"{', '.join(sorted(left)[:3])}: not beside a linear layer of this model")
    return result


def adapter_names(names: Iterable[str]) -> Iterator[str]:
    """Those of TorchTitan's names that are an adapter's."""
    return (name for name in names if name.endswith(LORA))


def _module(name: str) -> str:
    return name.rpartition(".lora_")[0]
