"""Pickles from strangers: only names on a list are understood, and none of them is ever run.

Every allowed class is replaced by an inert record of what the pickle says about it. Whatever else a pickle names
(`os.system`, `builtins.eval`) is refused before anything happens.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from titan_bridge.errors import BridgeError

_SLOW_BELOW = 4 << 20
"""Bytes up to which the pickle is read by the Python implementation: the one in C reserves memory as the pickle
says, so that four changed bytes can make it ask for tens of gigabytes."""


class Record:
    """Stands for an object of an allowed class: its name, the arguments it was made with, its state."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...] = ()) -> None:
        self.kind = kind
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def field(self, name: str) -> Any:
        """A field of its state. Raises BridgeError when there is none."""
        if not isinstance(self.state, dict) or name not in self.state:
            raise BridgeError(f"a {self.kind} without {name}")
        return self.state[name]


def kind_of(value: Any) -> str:
    """What a record stands for; "" for anything else."""
    return value.kind if isinstance(value, Record) else ""


def records(*names: str) -> dict[str, Callable[..., Any]]:
    """For each "module.Class" something that makes records of it, with `__new__`'s or `__init__`'s arguments."""
    return {name: _maker(name.rpartition(".")[2]) for name in names}


def _maker(kind: str) -> type:
    class Made(Record):
        __slots__ = ()

        # All is done here, because the opcode NEWOBJ calls nothing else.
        def __new__(cls, *args: Any) -> Made:
            made = object.__new__(cls)
            Record.__init__(made, kind, args)
            return made

        def __init__(self, *args: Any) -> None:
            pass

    return Made


def torch_dtype(name: str) -> torch.dtype | None:
    """torch.<name>, if that is a dtype."""
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


class _Rules:
    """What both implementations of the unpickler share."""

    allowed: Mapping[str, Any]
    persistent: Callable[[Any], Any] | None

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self.allowed:
            return self.allowed[full]
        if module == "torch" and (dtype := torch_dtype(name)) is not None:
            return dtype
        raise BridgeError(
            f"the pickle names {full!r:.100}, which no checkpoint needs; refused, nothing was run"
        )

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise BridgeError("the pickle refers to data outside itself; refused")
        return self.persistent(pid)


class _Python(_Rules, pickle._Unpickler):  # type: ignore[name-defined,misc]
    def get_extension(self, code: int) -> None:
        raise BridgeError("the pickle uses copyreg extensions; refused")

    def load_bytearray8(self) -> None:
        # It would reserve as many bytes as the opcode says.
        raise BridgeError("the pickle holds a bytearray, which no checkpoint needs; refused")

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}  # type: ignore[attr-defined]


class _Fast(_Rules, pickle.Unpickler):
    pass


_ALWAYS = {"collections.OrderedDict": OrderedDict}


def loads(
    data: bytes, allowed: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None, *, where: object
) -> Any:
    """Read a pickle that names nothing but `allowed` and torch dtypes.

    Raises:
        BridgeError: Any other name, and any pickle that is damaged; the message starts with `where`.
    """
    kind = _Python if len(data) <= _SLOW_BELOW else _Fast
    unpickler = kind(io.BytesIO(data))
    unpickler.allowed, unpickler.persistent = {**_ALWAYS, **allowed}, persistent
    try:
        return unpickler.load()
    except BridgeError as error:
        raise BridgeError(f"{where}: {error}") from None
    # A damaged pickle can make its opcodes fail in any way at all.
    except Exception as error:
        raise BridgeError(f"{where}: damaged pickle ({type(error).__name__}: {error})") from None
