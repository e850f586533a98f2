"""`load_weights`: a stream of Hugging Face tensors into the live parameters of one rank.

Each tensor is cut by the rank's own spec and only those slices are touched. Tensors that come from a mapped
file are read from disk only where they are copied, and at most one tensor is held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from vllm.logger import init_logger

from titan_bridge.checks import few
from titan_bridge.errors import BridgeError
from titan_bridge.sharding.boxes import Piece
from titan_bridge.sharding.strided import strided_copies
from titan_bridge.sharding.view import View

logger = init_logger(f"vllm.{__name__}")  # under vLLM's logger, whose handlers and level it shares


@dataclass(frozen=True, kw_only=True)
class Held:
    """One live tensor of the model and the pieces of the global tensor that this rank holds of it."""

    tensor: torch.Tensor
    pieces: tuple[Piece, ...]


@dataclass(kw_only=True)
class _Round:
    """What one call of `load` saw."""

    done: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    bytes_read: int = 0
    bytes_seen: int = 0


class WeightLoader:
    """Loads any number of rounds; a round either fills every parameter or raises and names all offenders."""

    def __init__(
        self,
        held: Mapping[str, Held],
        views: Iterable[View],
        optional: Iterable[View] = (),
        ignores: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """`held` by TorchTitan FQN; `views` must all arrive, `optional` may."""
        self._held = held
        self._views = {view.name: view for view in views}
        self._optional = {view.name: view for view in optional}
        self._ignores = ignores
        self.bytes_read = 0
        """Bytes that the last round copied out of the checkpoint on this rank."""

    def load(self, weights: Iterable[tuple[str, torch.Tensor]], *, partial: bool = False) -> set[str]:
        """Copy this rank's slices; returns the FQNs that were written, as vLLM names them (`model.` first).

        Raises:
            BridgeError: Missing (unless `partial`), unexpected, mis-shaped or wrongly typed tensors, all of them
                in one line.
        """
        seen = _Round()
        for name, tensor in weights:
            self._take(name, tensor, seen)
        if not partial and (missing := self._views.keys() - seen.done):
            seen.problems.append(f"missing: {few(missing)}")
        if seen.problems:
            raise BridgeError("the checkpoint does not fit the model: " + "; ".join(seen.problems))
        self.bytes_read = seen.bytes_read
        logger.info(
            "Read %.1f MiB of %.1f MiB of weights on this rank",
            seen.bytes_read / 2**20,
            seen.bytes_seen / 2**20,
        )
        return {f"model.{self._view(name).fqn}" for name in seen.done}

    def _view(self, name: str) -> View:
        return self._views.get(name) or self._optional[name]

    def _take(self, name: str, tensor: torch.Tensor, seen: _Round) -> None:
        view = self._views.get(name) or self._optional.get(name)
        if view is None:
            if not self._ignores(name):
                seen.problems.append(f"unexpected: {name} {tuple(tensor.shape)}")
            return
        seen.done.add(name)
        if tuple(tensor.shape) != view.shape:
            seen.problems.append(f"{name} has shape {tuple(tensor.shape)}, the model needs {view.shape}")
            return
        if not tensor.is_floating_point():
            seen.problems.append(f"{name} has dtype {tensor.dtype}, the model needs a floating-point type")
            return
        seen.bytes_seen += tensor.nbytes
        held = self._held[view.fqn]
        for target, source in self._copies(view, held, tensor):
            target.copy_(source)
            seen.bytes_read += source.nbytes

    @staticmethod
    def _copies(view: View, held: Held, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        local = held.tensor.data
        for (size, stride, at), (_, from_stride, start) in strided_copies(
            view, held.pieces, local.stride(), tensor.stride()
        ):
            yield (
                local.as_strided(size, stride, at + local.storage_offset()),
                tensor.as_strided(size, from_stride, start + tensor.storage_offset()),
            )
