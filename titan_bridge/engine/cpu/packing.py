"""When packed copies are made, and whether the plain weights stay beside them.

Packed copies are all that is computed with (`cpu/packed.py`). Where nothing else needs the plain weights, they exist
only while they are loaded, a few modules at a time: half the memory, and the next ones take the place of those before,
which the processor still has at hand. Weight transfer updates parts of them in place and takes failed updates back, so
it keeps them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from titan_bridge.engine.cpu.packed import Packed
from titan_bridge.engine.cpu.pages import zeros, zeros_like

_ALIGNMENT = 64  # bytes: where a weight starts behind another


Ahead = dict[Packed, Any]
"""By module: packed copies that it may take."""


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
    def loading(self, *, piecemeal: bool = False) -> Iterator[Loading]:
        """Plain weights are there to be written, and are packed in the end at the latest.

        `piecemeal`: one that does not stay has its memory from when `begin` names it; else all are there, what was
        dropped as zeros. After an error, modules that were not packed go on with what they had.
        """
        loading = Loading(self)
        if not piecemeal:
            self._restore()
            loading.begun.update(self._passing)
        try:
            yield loading
            loading.finish()
        finally:
            self._drop(self._passing)

    def ahead(self, weights: Mapping[str, torch.Tensor]) -> Ahead:
        """Packed copies made of weights that are not live yet, by FQN, of modules that have all of theirs here."""
        return {
            module: module.packed(*(weights[name] for name in names))
            for module, names in self._names.items()
            if all(name in weights for name in names)
        }

    def refresh(self, changed: Iterable[torch.Tensor], ahead: Ahead | None = None) -> None:
        """Pack again what is made from the parameters `changed`, which were kept and have been written.

        `ahead`: made of what they are now; is used up.
        """
        wanted = {id(weight) for weight in changed}
        for module in self._names:
            if any(id(weight) in wanted for weight in module.packs()):
                if ahead and module in ahead:
                    module.take(ahead.pop(module))
                else:
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
        module.take(module.packed(*(weight.data for weight in module.packs())))

    def _restore(self) -> None:
        for weight, live in self._passing.values():
            if _is_hollow(weight):
                weight.data = live.data = zeros_like(weight, weight.device)

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._passing:
                weight, live = self._passing[name]
                weight.data = live.data = weight.new_full((), math.nan).expand(weight.shape)


class Loading:
    """Told which weights are read, it packs each module with the last one of it."""

    def __init__(self, packing: Packing) -> None:
        self._packing = packing
        self._names = packing._names
        self._passing = packing._passing
        self._waiting = {module: set(names) for module, names in self._names.items()}
        self._users: defaultdict[str, list[Packed]] = defaultdict(list)
        for module, names in self._names.items():
            for name in names:
                self._users[name].append(module)
        self._rooms: dict[Packed, torch.Tensor] = {}
        self._free: list[torch.Tensor] = []
        self.begun: set[str] = set()
        """Weights whose memory is there and holds nothing of another weight."""

    def begin(self, name: str, *, whole: bool) -> None:
        """A weight is about to be written; `whole`: all of it, so that what lies in its memory need not be cleared."""
        if name not in self._passing or name in self.begun:
            return
        (module,) = self._users[name]
        if module not in self._rooms:
            self._make_room(module)
        self.begun.add(name)
        if not whole:
            self._passing[name][0].data.zero_()

    def arrived(self, name: str) -> None:
        """All of a weight is in its place."""
        for module in self._users.get(name, ()):
            if module in self._waiting:
                self._waiting[module].discard(name)
                if not self._waiting[module]:
                    self._pack(module)

    def finish(self) -> None:
        """Pack what is not packed yet; of what never began, nothing was to be read (padding): it is zero."""
        for module in list(self._waiting):
            for name in self._names[module]:
                self.begin(name, whole=False)
            self._pack(module)

    def _pack(self, module: Packed) -> None:
        del self._waiting[module]
        self._packing._pack(module)
        self._packing._drop(self._names[module])
        if module in self._rooms:
            self._free.append(self._rooms.pop(module))

    def _make_room(self, module: Packed) -> None:
        """One piece of memory for all weights of a module that do not stay, in their order."""
        pairs = [self._passing[name] for name in self._names[module] if name in self._passing]
        starts = list(itertools.accumulate((_padded(weight.nbytes) for weight, _ in pairs), initial=0))
        fitting = [room for room in self._free if room.nbytes >= starts[-1]]
        if fitting:
            room = min(fitting, key=lambda room: room.nbytes)
            self._free = [free for free in self._free if free is not room]
        else:
            room = zeros(starts[-1], pairs[0][0].device)
        self._rooms[module] = room
        for (weight, live), start in zip(pairs, starts, strict=False):
            weight.data = live.data = (
                room[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
            )


def _padded(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _is_hollow(weight: torch.Tensor) -> bool:
    """Whether its memory is gone: shape and dtype are there, who reads it sees NaN, and copying into it is refused."""
    return weight.untyped_storage().nbytes() < weight.nbytes
