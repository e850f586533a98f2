"""`load_weights`: a stream of Hugging Face tensors into the live parameters of one rank.

The slices are those of the planner, with the checkpoint as one source that has every tensor whole. Tensors that
come from a mapped file are read from disk only where they are copied, and at most one tensor is held at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from titan_bridge.checkpoint.finite import count_not_finite, not_finite_lines
from titan_bridge.engine.log import logger_of
from titan_bridge.errors import BridgeError, few
from titan_bridge.sharding.layout import Layout, torch_dtype
from titan_bridge.sharding.moves import Copy
from titan_bridge.sharding.plan import plan
from titan_bridge.sharding.tensors import TensorMetadata
from titan_bridge.sharding.view import View

logger = logger_of(__name__)

_SOURCE = "checkpoint"


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
        live: Mapping[str, torch.Tensor],
        layout: Layout,
        rank: int,
        views: Sequence[View],
        optional: Iterable[View] = (),
        ignores: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Plan once for all rounds.

        Args:
            live: This rank's local tensors by TorchTitan FQN, contiguous; written in place.
            layout: Where every rank's slices lie.
            rank: This rank in the layout's meshes.
            views: Tensors that must all arrive.
            optional: Tensors that may arrive and say nothing new (a tied head).
            ignores: Names that are passed over.
        """
        self._live = live
        self._views = {view.name: view for view in views}
        self._optional = {view.name: view for view in optional}
        self._ignores = ignores
        whole = [
            TensorMetadata.whole(v.name, v.shape, torch_dtype(layout.params[v.fqn].dtype), _SOURCE)
            for v in views
        ]
        self._copies: defaultdict[str, list[Copy]] = defaultdict(list)
        # Padding of the vocabulary is in no checkpoint.
        for copy in plan(whole, layout, views, allow_missing=True).copies(destination=rank):
            self._copies[copy.source_name].append(copy)
        self.bytes_read = 0
        """Bytes that the last round copied out of the checkpoint on this rank."""

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy this rank's slices; returns the FQNs that were written, as vLLM names them (`model.` first).

        Raises:
            BridgeError: Missing, unexpected, mis-shaped or wrongly typed tensors, all of them in one line.
        """
        seen = _Round()
        for name, tensor in weights:
            self._take(name, tensor, seen)
        if missing := self._views.keys() - seen.done:
            seen.problems.append(f"missing: {few(sorted(missing), 4)}")
        if seen.problems:
            raise BridgeError("the checkpoint does not fit the model: " + "; ".join(seen.problems))
        self.bytes_read = seen.bytes_read
        logger.info(
            "Read %.1f MiB of %.1f MiB of weights on this rank",
            seen.bytes_read / 2**20,
            seen.bytes_seen / 2**20,
        )
        written = {copy.destination_name for copies in self._copies.values() for copy in copies}
        counts = {fqn: count_not_finite(self._live[fqn]) for fqn in sorted(written)}
        nan, inf = ({fqn: count[i] for fqn, count in counts.items() if count[i]} for i in (0, 1))
        for line in not_finite_lines(nan, inf):
            logger.warning("%s", line)
        return {f"model.{self._views[name].fqn}" for name in seen.done & self._views.keys()}

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
        tensor = tensor.contiguous()
        for copy in self._copies.get(name, ()):
            copy.destination_window.of(self._live[copy.destination_name]).copy_(copy.source_window.of(tensor))
            seen.bytes_read += copy.elements * tensor.element_size()
