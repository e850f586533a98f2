"""Tensors as `torch.save` writes them: a zip archive with a pickle and the tensors' bytes, stored plainly.

DCP files are such archives of one tensor, one after the other. Finding a tensor reads the directory, the small
entries and their headers; writing an archive takes the tensor's bytes in any order, and their checksum at the end.
Both sides are held against `torch.load`, `torch.save` and `zipfile` by the tests.
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2
from zlib_ng import zlib_ng

from titan_bridge.checkpoint.pickles import is_shape, loads
from titan_bridge.errors import BridgeError
from titan_bridge.sharding.boxes import contiguous_stride
from titan_bridge.sharding.moves import row_major

_STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}
_LOCAL, _CENTRAL, _END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
_PREFIX, _DATA = "archive", "data/0"
_MOST_PICKLE = 1 << 20
_PIECE_BYTES = 8 << 20
"""Read at once to be checked."""
ALIGNMENT = 64
LARGEST = (1 << 32) - (1 << 20)
"""Bytes of the largest tensor that one archive may hold here: larger ones would need zip's 64-bit fields."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A tensor inside an archive."""

    offset: int
    """Bytes from the start of the archive to the tensor's first byte."""
    shape: tuple[int, ...]
    dtype: torch.dtype


Read = Callable[[int, int], bytes]
"""(offset in the archive, length) -> bytes."""


def locate(read: Read, length: int, where: str) -> Placed:
    """Find the tensor in an archive of `length` bytes.
    Raises BridgeError: anything but one contiguous tensor, stored plainly and little-endian, in an intact archive."""
    tensor, place = unpickled(read, length, where)
    if not isinstance(tensor, Tensor):
        raise BridgeError(f"{where}: not a plain tensor")
    return place(tensor, where)


def unpickled(
    read: Read,
    length: int,
    where: str,
    *,
    allowed: Mapping[str, Any] | None = None,
    most: int = _MOST_PICKLE,
) -> tuple[Any, Callable[[Tensor, str], Placed]]:
    """What was saved in an archive of `length` bytes, with a `Tensor` for each tensor, and what finds one of them.

    Args:
        allowed: What the pickle may name beside tensors; see `pickles.loads`.
        most: Bytes of the pickle, and of the archive's directory.

    Raises:
        BridgeError: A damaged archive, or a pickle that is refused. `place` raises for a tensor that is not contiguous.
    """
    entries = _directory(read, length, where, most)
    pickled = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise BridgeError(f"{where}: no archive of torch.save: {len(pickled)} data.pkl in it")
    prefix = pickled[0].removesuffix("data.pkl")
    order = entries.get(prefix + "byteorder")
    if order is not None and _content(read, length, order, where, 16) != b"little":
        raise BridgeError(f"{where}: the tensor is stored big-endian; only little-endian is read")
    content = _content(read, length, entries[pickled[0]], where, most)

    def place(tensor: Tensor, where: str) -> Placed:
        storage, first, shape, stride = tensor.storage, tensor.first, tensor.shape, tensor.stride
        if prefix + "data/" + storage.key not in entries:
            raise BridgeError(f"{where}: the archive has no data for its tensor")
        offset, size = _span(read, length, entries[prefix + "data/" + storage.key], where)
        width, count = storage.dtype.itemsize, math.prod(shape)
        if storage.count * width != size:
            raise BridgeError(
                f"{where}: {size} bytes of data; {storage.count} of {storage.dtype} were expected"
            )
        if count and not row_major(shape, stride):
            raise BridgeError(f"{where}: strides {stride} for {shape}; only contiguous tensors are read")
        if first + count > storage.count:
            raise BridgeError(
                f"{where}: a tensor of shape {shape} at {first} in {storage.count} elements of data"
            )
        return Placed(offset=offset + first * width, shape=shape, dtype=storage.dtype)

    return loads(content, {**_ALLOWED, **(allowed or {})}, _storage, where=where), place


def is_intact(read: Read, length: int, where: str) -> bool | None:
    """Whether every entry of an archive has its CRC-32; None for an archive without (`set_crc32_options(False)`).
    Raises BridgeError: no archive of stored entries."""
    entries = _directory(read, length, where).values()
    if not any(entry.CRC for entry in entries):
        return None
    for entry in entries:
        start, size = _span(read, length, entry, where)
        crc = 0
        for at in range(0, size, _PIECE_BYTES):
            crc = zlib_ng.crc32(read(start + at, min(_PIECE_BYTES, size - at)), crc)
        if crc != entry.CRC:
            return False
    return True


@dataclass(frozen=True)
class _Storage:
    """A tensor's data: an entry of the archive, of `count` elements."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class Tensor:
    """A tensor in its storage; `first` and `stride` in elements."""

    storage: _Storage
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    whole: tuple[int, ...] | None = None
    """Global shape of the DTensor whose local tensor it is."""


def _storage(pid: Any) -> _Storage:
    if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage" or type(pid[1]) is not torch.dtype:
        raise BridgeError(f"an unknown kind of data {reprlib.repr(pid)}")
    if not isinstance(pid[2], str) or not is_shape(pid[4:]):
        raise BridgeError(f"damaged reference to data {reprlib.repr(pid)}")
    return _Storage(pid[1], pid[2], pid[4])


def _rebuild_tensor(args: tuple[Any, ...]) -> Tensor:
    fine = len(args) >= 4 and isinstance(args[0], _Storage) and is_shape(args[1:2])
    fine = fine and all(type(value) is tuple and is_shape(value) for value in args[2:4])
    if not fine or len(args[2]) != len(args[3]):
        raise BridgeError("damaged description of a tensor")
    return Tensor(*args[:4])


_ALLOWED: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda args: args[0] if args else None,
    **{f"torch.{name}": dtype for dtype, name in _STORAGES.items()},
}


class _Within(io.RawIOBase):
    """An archive inside a file, for `zipfile`: a place, and reads of bounded size."""

    def __init__(self, read: Read, length: int, most: int) -> None:
        self._read, self._length, self._most, self._at = read, length, most, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        if not 0 <= self._at <= self._length:
            raise zipfile.BadZipFile(f"nothing at {self._at} of {self._length} bytes")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int | None = -1) -> bytes:
        left = self._length - self._at
        count = left if count is None or count < 0 else min(count, left)
        if count > self._most:
            raise zipfile.BadZipFile(f"a directory of {count} bytes")
        data = self._read(self._at, count)
        self._at += count
        return data


def _directory(read: Read, length: int, where: str, most: int = _MOST_PICKLE) -> dict[str, zipfile.ZipInfo]:
    """Entries by name."""
    try:
        with zipfile.ZipFile(_Within(read, length, most)) as archive:
            found = archive.infolist()
    except zipfile.BadZipFile as error:
        raise BridgeError(
            f"{where}: no end of a zip archive, or a damaged one: truncated, or not written by torch.save ({error})"
        ) from None
    # A damaged directory can make the standard library fail in any way at all.
    except (ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise BridgeError(f"{where}: damaged zip archive ({error})") from None
    entries = {entry.filename: entry for entry in found}
    if len(entries) < len(found):
        raise BridgeError(f"{where}: damaged zip archive (a name twice)")
    for name, entry in entries.items():
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise BridgeError(f"{where}: {name} is compressed; only stored entries are read")
    return entries


def _span(read: Read, length: int, entry: zipfile.ZipInfo, where: str) -> tuple[int, int]:
    """(offset, size) of an entry's bytes."""
    if entry.header_offset + 30 > length or (head := read(entry.header_offset, 30))[:4] != _LOCAL:
        raise BridgeError(f"{where}: damaged zip archive (entry at {entry.header_offset})")
    name_length, extra_length = struct.unpack_from("<HH", head, 26)
    start = entry.header_offset + 30 + name_length + extra_length
    if start + entry.file_size > length:
        raise BridgeError(
            f"{where}: damaged zip archive ({entry.file_size} bytes at {start} in {length}): truncated?"
        )
    return start, entry.file_size


def _content(read: Read, length: int, entry: zipfile.ZipInfo, where: str, most: int) -> bytes:
    start, size = _span(read, length, entry, where)
    if size > most:
        raise BridgeError(f"{where}: damaged archive (an entry of {size} bytes)")
    return read(start, size)


class Archive:
    """The archive of one tensor to be written: everything around the tensor's bytes.

    `head(crc)`, the tensor's `data_bytes` bytes and `tail(crc)` are the archive, where `crc` is the CRC-32 of the
    tensor's bytes. Archives that start at multiples of 64 have their tensors there, too.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raises BridgeError for a dtype that it cannot write and for more than about 4 GiB."""
        self.data_bytes = math.prod(shape) * dtype.itemsize
        if self.data_bytes > LARGEST:
            raise BridgeError(
                f"a chunk of {self.data_bytes} bytes; a chunk of DCP has at most {LARGEST} here"
            )
        before, self._directory = b"", b""
        for name, content in (
            ("data.pkl", _pickle(shape, dtype)),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            crc = zlib.crc32(content)
            self._directory += _central(name, len(content), crc, len(before))
            before += _local(name, len(content), crc) + content
        self._before = before
        fixed = len(before) + len(_local(_DATA, 0, 0)) + 4
        pad = -fixed % ALIGNMENT
        # An extra field that readers skip; torch.save pads in the same way.
        self._extra = b"FB" + struct.pack("<H", pad) + bytes(pad)
        self.head_bytes = fixed + pad
        """Bytes before the tensor; a multiple of 64."""
        self.total_bytes = self.head_bytes + self.data_bytes + len(self.tail(0))
        """Bytes of the archive."""

    def head(self, crc: int) -> bytes:
        """What comes before the tensor's bytes."""
        return self._before + _local(_DATA, self.data_bytes, crc, self._extra)

    def tail(self, crc: int) -> bytes:
        """What comes after them."""
        directory = self._directory + _central(_DATA, self.data_bytes, crc, len(self._before))
        start = self.head_bytes + self.data_bytes
        return directory + _END + struct.pack("<HHHHIIH", 0, 0, 4, 4, len(directory), start, 0)


def _local(name: str, size: int, crc: int, extra: bytes = b"") -> bytes:
    text = f"{_PREFIX}/{name}".encode()
    fields = (0, 0x800, 0, 0, 0x21, crc, size, size, len(text), len(extra))
    return _LOCAL + struct.pack("<HHHHHIIIHH", *fields) + text + extra


def _central(name: str, size: int, crc: int, header: int) -> bytes:
    text = f"{_PREFIX}/{name}".encode()
    fields = (0, 0, 0x800, 0, 0, 0x21, crc, size, size, len(text), 0, 0, 0, 0, 0, header)
    return _CENTRAL + struct.pack("<HHHHHHIIIHHHHHII", *fields) + text


class _Pickler(pickle.Pickler):
    """Pickles a `Tensor` as the call that makes it, and its `_Storage` as a reference to an entry."""

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        return "storage", getattr(torch, _STORAGES[value.dtype]), value.key, "cpu", value.count

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        arguments = (value.storage, value.first, value.shape, value.stride, False, OrderedDict())
        return _rebuild_tensor_v2, arguments


def _pickle(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    if dtype not in _STORAGES:
        raise BridgeError(f"{dtype} cannot be written to DCP; allowed: {', '.join(map(str, _STORAGES))}")
    out = io.BytesIO()
    stride = tuple(max(1, step) for step in contiguous_stride(shape))
    storage = _Storage(dtype, "0", math.prod(shape))
    _Pickler(out, protocol=2).dump(Tensor(storage, 0, shape, stride))
    return out.getvalue()
