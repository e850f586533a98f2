"""Pickles from strangers: only names on a list are understood, and none of them is ever run.

Every allowed class is replaced by an inert record of what the pickle says about it. Whatever else a pickle names
(`os.system`, `builtins.eval`) is refused before anything happens. Only the opcodes that torch writes are read, and
each takes time and memory in proportion to its bytes: nothing is copied that the pickle can name again and again,
nothing is hashed but text and records.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch

from titan_bridge.errors import BridgeError

Maker = Callable[[tuple[Any, ...]], Any]
"""Makes what stands for an object, from the arguments that the pickle gives its class."""


class Record:
    """Stands for an object of an allowed class: its name, the arguments it was made with, its state."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...]) -> None:
        self.kind = kind
        self.args = args
        self.state: Any = None

    def field(self, name: str) -> Any:
        """A field of its state. Raises BridgeError when there is none."""
        if not isinstance(self.state, dict) or name not in self.state:
            raise BridgeError(f"a {self.kind} without {name}")
        return self.state[name]


def kind_of(value: Any) -> str:
    """What a record stands for; "" for anything else."""
    return value.kind if isinstance(value, Record) else ""


def records(*names: str) -> dict[str, Maker]:
    """For each "module.Class" what makes records of it."""
    return {name: partial(Record, name.rpartition(".")[2]) for name in names}


def size(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Makes the tuple that stands for a `torch.Size`."""
    if len(args) != 1 or type(args[0]) is not tuple:
        raise BridgeError("damaged pickle (a torch.Size of no tuple)")
    return args[0]


def torch_dtype(name: str) -> torch.dtype | None:
    """torch.<name>, if that is a dtype."""
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


_OPCODES = {
    getattr(pickle, name)[0]
    for name in (
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
        *("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "APPEND", "APPENDS"),
        *("EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
    )
}
"""What torch.save and DCP write. Left out are, for instance, sets, and the opcodes that reserve memory."""

_InPython: Any = pickle._Unpickler  # type: ignore[attr-defined]  # the one in C reserves memory as the memo's indices say


class _Unpickler(_InPython):
    def __init__(self, data: bytes, allowed: Mapping[str, Any], persistent: Callable[[Any], Any] | None):
        super().__init__(io.BytesIO(data))
        self._allowed, self._persistent = allowed, persistent

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._allowed:
            return self._allowed[full]
        if full == "collections.OrderedDict":
            return _ordered_dict
        if module == "torch" and (dtype := torch_dtype(name)) is not None:
            return dtype
        if module.split(".")[0] == "torchao":
            raise BridgeError(
                f"a quantized tensor of torchao ({full!r:.100}); only plain ones are read: save the model in "
                "bfloat16 or float32"
            )
        raise BridgeError(
            f"the pickle names {full!r:.100}, which no checkpoint needs; refused, nothing was run"
        )

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
        if not isinstance(self.stack[-1], Record):
            raise BridgeError("damaged pickle (a state of what has none)")
        self.stack[-1].state = state

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or not all(isinstance(key, (str, Record)) for key in items[::2]):
            raise BridgeError("damaged pickle (a dict with keys that are no text)")
        target.update(zip(items[::2], items[1::2], strict=True))

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: _InPython.dispatch[code] for code in _OPCODES},
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


def loads(
    data: bytes, allowed: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None, *, where: object
) -> Any:
    """Read a pickle that names nothing but `allowed` and torch dtypes.

    Args:
        allowed: "module.name" to a `Maker`, or to what stands for the name itself.
        persistent: What stands for data outside of the pickle, by its id.

    Raises:
        BridgeError: Any other name, and any pickle that is damaged; the message starts with `where`.
    """
    try:
        return _Unpickler(data, allowed, persistent).load()
    except BridgeError as error:
        raise BridgeError(f"{where}: {error}") from None
    # A damaged pickle can make its opcodes fail in any way at all.
    except Exception as error:
        raise BridgeError(f"{where}: damaged pickle ({type(error).__name__}: {error})") from None
