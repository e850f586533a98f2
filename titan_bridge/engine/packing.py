"""When packed copies are made, and whether the plain weights stay beside them.

Packed copies are all that is computed with (`cpu_packed`). Where nothing else needs the plain weights, they exist only
while they are loaded, a few modules at a time: half the memory, and less of it to touch, which is most of what
loading costs. Weight transfer updates parts of them in place and takes failed updates back, so it keeps them.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from titan_bridge.engine.cpu_packed import Packed
from titan_bridge.engine.pages import zeros_like


class Packing:
    """The packed modules of one model, which may be none."""

    def __init__(self, model: nn.Module, live: Mapping[str, torch.Tensor], *, keep: bool) -> None:
        """Nothing is packed yet, and every weight is there.

        Args:
            live: This rank's local tensors by FQN; they share memory with the parameters of `model`.
            keep: Whether plain weights stay for good.
        """
        modules = [module for module in model.modules() if isinstance(module, Packed)]
        names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name in live}
        self._names = {module: [names[id(weight)] for weight in module.packs()] for module in modules}
        # A tied head's weight is the embedding's, too.
        owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
        self._passing = {
            names[id(weight)]: (weight, live[names[id(weight)]])
            for module in modules
            for weight in module.packs()
            if not keep and owners[id(weight)] == 1
        }

    @contextlib.contextmanager
    def loading(self) -> Iterator[Callable[[str], None]]:
        """The plain weights are there to be written; all of them must be. What is not packed at the end is packed then.

        Gives a function that may be told the FQN of each weight once it is complete: with the last one of a module,
        that module is packed, and its plain weights are gone where they do not stay. After an error, modules that
        were not packed go on with what they had.
        """
        waiting = {module: set(names) for module, names in self._names.items()}
        users = defaultdict(list)
        for module, names in self._names.items():
            for name in names:
                users[name].append(module)

        def pack(module: Packed) -> None:
            del waiting[module]
            self._pack(module)
            self._drop(self._names[module])

        def arrived(name: str) -> None:
            for module in users.get(name, ()):
                if module in waiting:
                    waiting[module].discard(name)
                    if not waiting[module]:
                        pack(module)

        self._restore()
        try:
            yield arrived
            for module in list(waiting):
                pack(module)
        finally:
            self._drop(self._passing)

    def refresh(self, changed: Iterable[torch.Tensor]) -> None:
        """Pack again what is made from the parameters `changed`, which were kept and have been written."""
        wanted = {id(weight) for weight in changed}
        for module in self._names:
            if any(id(weight) in wanted for weight in module.packs()):
                self._pack(module)

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[None]:
        """Plain weights read back from their packed copies; see `Packed.unpack` for what a copy cannot tell."""
        self._restore()
        try:
            for module, names in self._names.items():
                if any(name in self._passing for name in names):
                    module.unpack()
            yield
        finally:
            self._drop(self._passing)

    def _pack(self, module: Packed) -> None:
        module.pack()

    def _restore(self) -> None:
        for weight, live in self._passing.values():
            if _is_hollow(weight):
                weight.data = live.data = zeros_like(weight, weight.device)

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._passing:
                weight, live = self._passing[name]
                weight.data = live.data = weight.new_full((), math.nan).expand(weight.shape)


def _is_hollow(weight: torch.Tensor) -> bool:
    """Whether its memory is gone: shape and dtype are there, who reads it sees NaN, and copying into it is refused."""
    return weight.untyped_storage().nbytes() < weight.nbytes
