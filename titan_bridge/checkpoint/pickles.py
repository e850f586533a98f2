"""Pickles from strangers: only names on a list are understood, and none of them is ever run.

Every allowed class is replaced by a stand-in that keeps what the pickle says about the object. Whatever else a pickle
names (`os.system`, `builtins.eval`) is refused before anything happens. Only the opcodes that torch writes are read,
and each takes time and memory in proportion to its bytes: nothing is copied that the pickle can name again and again,
nothing is hashed but text, small numbers and stand-ins, which hash by identity. torch's own classes are not built:
importing them takes a second, and one of them hashes what the pickle gives it.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from titan_bridge.checkpoint.files import read_bytes, size_of
from titan_bridge.errors import BridgeError, about


class StandIn:
    """An object of a class that a pickle names, without the class: its fields, or what it was made with (`args`).
    A state that is no dict is the field `state`. Pickled, it is the object again."""

    def __init__(self, args: tuple[Any, ...] = (), **fields: Any) -> None:
        if args:
            fields["args"] = args
        self.__dict__ = fields

    def __reduce__(self) -> tuple[Any, ...]:
        fields = vars(self)
        if "args" in fields:
            return type(self), fields["args"]
        return copyreg.__newobj__, (type(self),), fields.get("state", fields)  # type: ignore[attr-defined]


def stand_ins(module: str, *names: str) -> dict[str, Any]:
    """A stand-in for each class (or function that makes an object) in `module`, by its full name."""
    return {f"{module}.{name}": type(name, (StandIn,), {"__module__": module}) for name in names}


def fields(value: Any, kind: str, *names: str) -> list[Any]:
    """Fields of an object of the class `kind`. Raises BridgeError for another object, and where one is missing."""
    found = vars(value) if kind_of(value) == kind else {}
    if missing := [name for name in names if name not in found]:
        raise BridgeError(f"no {kind} with {missing[0]}")
    return [found[name] for name in names]


def kind_of(value: Any) -> str:
    """The name of the class that a stand-in stands for; "" for anything else."""
    return type(value).__name__ if isinstance(value, StandIn) else ""


def size_from(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Makes the tuple that stands for a `torch.Size`."""
    if len(args) != 1 or type(args[0]) is not tuple:
        raise BridgeError("damaged pickle (a torch.Size of no tuple)")
    return args[0]


_OPCODES = {  # what torch.save and DCP write; left out are sets, for instance, and those that reserve memory
    getattr(pickle, name)[0]
    for name in (
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
        *("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "APPEND", "APPENDS"),
        *("EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
    )
}

MOST_DIMS = 64
_MOST_KEY = 1 << 20
"""Numbers of ranks. Larger ones could be chosen such that they all fall into one place of the table."""

_InPython: Any = pickle._Unpickler  # type: ignore[attr-defined]  # the one in C reserves memory as the memo's indices say


class _Unpickler(_InPython):
    def __init__(self, data: bytes, allowed: Mapping[str, Any], persistent: Callable[[Any], Any] | None):
        file = io.BytesIO(data)
        super().__init__(file)
        self._allowed, self._persistent = allowed, persistent
        self.read, self.readline = file.read, file.readline  # all of it is there: frames say nothing new
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.proto = 0

    def load(self) -> Any:
        """The loop of the standard library without its buffer for frames: a third of the time."""
        read, dispatch = self.read, self.dispatch
        try:
            while True:
                dispatch[read(1)[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value

    def load_frame(self) -> None:
        self.read(8)

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._allowed:
            return self._allowed[full]
        if full == "collections.OrderedDict":
            return _ordered_dict
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        what = f"the pickle names {full!r:.100}, which no checkpoint needs; refused, nothing was run"
        if module.split(".")[0] == "torchao":
            what = f"a quantized tensor of torchao ({full!r:.100}) is not read; save the model in bfloat16 or float32"
        raise BridgeError(what)

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise BridgeError("the pickle refers to data outside itself; refused")
        return self._persistent(pid)

    def make(self) -> None:
        args = self.stack.pop()
        if type(args) is not tuple:
            raise BridgeError("damaged pickle (arguments that are no tuple)")
        self.stack[-1] = self.stack[-1](args)

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], StandIn):
            raise BridgeError("damaged pickle (a state of what has none)")
        self.stack[-1].__dict__ = state if type(state) is dict else {"state": state}

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key in items[::2]:
            small = type(key) is int and 0 <= key < _MOST_KEY
            if type(target) is not dict or not (small or type(key) is str or isinstance(key, StandIn)):
                raise BridgeError("damaged pickle (a dict with keys that are no text)")
        target.update(zip(items[::2], items[1::2], strict=True))

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: _InPython.dispatch[code] for code in _OPCODES},
        pickle.FRAME[0]: load_frame,
        pickle.REDUCE[0]: make,
        pickle.NEWOBJ[0]: make,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _ordered_dict(args: tuple[Any, ...]) -> dict[str, Any]:
    if args:
        raise BridgeError("damaged pickle (an OrderedDict with arguments)")
    return {}


def is_shape(value: Any) -> bool:
    """Whether it is a tuple of a few whole numbers, as sizes and places are."""
    fits = isinstance(value, tuple) and len(value) <= MOST_DIMS
    return fits and all(type(n) is int and 0 <= n < 2**62 for n in value)


def load_file(path: Path, allowed: Mapping[str, Any], most: int) -> tuple[Any, int]:
    """What `loads` reads of a file of at most `most` bytes, and how many it has."""
    length = size_of(path)
    if length > most:
        raise BridgeError(f"{path} has {length} bytes; at most {most} are read")
    with about(path):
        return loads(read_bytes(path, 0, length), allowed), length


def loads(data: bytes, allowed: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read a pickle that names nothing but `allowed` and torch dtypes.

    `allowed` says what stands for "module.name": a class of stand-ins, a function of a tuple of arguments, or a value;
    `persistent` what stands for data outside of the pickle, by its id.
    Raises BridgeError: any other name, and any pickle that is damaged.
    """
    try:
        return _Unpickler(data, allowed, persistent).load()
    except BridgeError:
        raise
    # A damaged pickle can make its opcodes fail in any way at all.
    except Exception as error:
        raise BridgeError(f"damaged pickle ({type(error).__name__}: {error})") from None
