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
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2
from zlib_ng import zlib_ng

from titan_bridge.checkpoint.pickles import is_shape, loads
from titan_bridge.errors import BridgeError
from titan_bridge.sharding.boxes import contiguous_stride
from titan_bridge.sharding.moves import row_major

_STORAGES = {
    **{torch.float64: "DoubleStorage", torch.float32: "FloatStorage", torch.float16: "HalfStorage"},
    **{torch.bfloat16: "BFloat16Storage", torch.int64: "LongStorage", torch.int32: "IntStorage"},
    **{torch.int16: "ShortStorage", torch.int8: "CharStorage", torch.uint8: "ByteStorage"},
    **{torch.complex64: "ComplexFloatStorage", torch.complex128: "ComplexDoubleStorage"},
    torch.bool: "BoolStorage",
}
_MOST_PICKLE = 1 << 20
_PIECE_BYTES = 8 << 20  # read at once to be checked
ALIGNMENT = 64
_HEADER = 30  # bytes of a zip entry's header before its name
Read = Callable[[int, int], bytes]  # (offset in the archive, length) -> bytes


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A tensor inside an archive."""

    offset: int  # bytes from the start of the archive to the tensor's first byte
    shape: tuple[int, ...]
    dtype: torch.dtype


def locate(read: Read, length: int) -> Placed:
    """Find the tensor in an archive of `length` bytes.
    Raises BridgeError: anything but one contiguous tensor, stored plainly and little-endian, in an intact archive."""
    saved = Saved(read, length)
    if not isinstance(saved.root, Tensor):
        raise BridgeError("not a plain tensor")
    return saved.place(saved.root)


def is_intact(read: Read, length: int) -> bool | None:
    """Whether every entry of an archive has its CRC-32; None for an archive without (`set_crc32_options(False)`).
    Raises BridgeError: no archive of stored entries."""
    archive = _Zip(read, length, _MOST_PICKLE)
    if not any(entry.CRC for entry in archive.entries.values()):
        return None
    for name, entry in archive.entries.items():
        (start, size), crc = archive.span(name), 0
        for at in range(0, size, _PIECE_BYTES):
            crc = zlib_ng.crc32(read(start + at, min(_PIECE_BYTES, size - at)), crc)
        if crc != entry.CRC:
            return False
    return True


class Saved:
    """What torch.save wrote into an archive: `root`, with a `Tensor` in the place of each tensor."""

    def __init__(
        self, read: Read, length: int, *, allowed: Mapping[str, Any] | None = None, most: int = _MOST_PICKLE
    ) -> None:
        """`allowed`: what the pickle may name beside tensors; `most`: bytes of it, and of the archive's directory.
        Raises BridgeError: a damaged archive, or a pickle that is refused."""
        self._zip = _Zip(read, length, most)
        pickled = [name for name in self._zip.entries if name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise BridgeError(f"no archive of torch.save: {len(pickled)} data.pkl in it")
        self._prefix = pickled[0].removesuffix("data.pkl")
        order = self._prefix + "byteorder"
        if order in self._zip.entries and self._zip.content(order, 16) != b"little":
            raise BridgeError("the tensor is stored big-endian; only little-endian is read")
        self.root = loads(self._zip.content(pickled[0], most), {**_ALLOWED, **(allowed or {})}, _storage)

    def place(self, tensor: Tensor) -> Placed:
        """Where a tensor lies. Raises BridgeError: one that is not contiguous, or not in the archive."""
        storage, first, shape = tensor.storage, tensor.first, tensor.shape
        offset, size = self._zip.span(f"{self._prefix}data/{storage.key}")
        width, count = storage.dtype.itemsize, math.prod(shape)
        if storage.count * width != size:
            raise BridgeError(f"{size} bytes of data; {storage.count} of {storage.dtype} were expected")
        if count and not row_major(shape, tensor.stride):
            raise BridgeError(f"strides {tensor.stride} for {shape}; only contiguous tensors are read")
        if first + count > storage.count:
            raise BridgeError(f"a tensor of shape {shape} at {first} in {storage.count} elements of data")
        return Placed(offset=offset + first * width, shape=shape, dtype=storage.dtype)


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
    whole: tuple[int, ...] | None = None  # global shape of the DTensor whose local tensor it is


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
    """An archive inside a file, for `zipfile`. All of it, not its end alone: newer releases of the standard library
    refuse a 64-bit end, which `torch.save` always writes, whose offsets are not those of what they are given."""

    def __init__(self, read: Read, length: int, most: int) -> None:
        """`most`: bytes of one read."""
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
        self._at += count
        return self._read(self._at - count, count)


class _Zip:
    """A zip archive of stored entries (by name), in `length` bytes of which `read` gives any part."""

    def __init__(self, read: Read, length: int, most: int) -> None:
        """`most`: bytes of the directory."""
        self._read, self._length = read, length
        try:
            with zipfile.ZipFile(_Within(read, length, most)) as archive:
                found = archive.infolist()
        # What is cut off or damaged can make the standard library fail in any way at all.
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError) as error:
            what = "no end of a zip archive, or a damaged one: truncated, or not written by torch.save"
            raise BridgeError(f"{what} ({error})") from None
        self.entries = {entry.filename: entry for entry in found}
        if len(self.entries) < len(found):
            raise BridgeError("damaged zip archive (a name twice)")
        for name, entry in self.entries.items():
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise BridgeError(f"{name} is compressed; only stored entries are read")

    def span(self, name: str) -> tuple[int, int]:
        """(offset, size) of an entry's bytes."""
        if (entry := self.entries.get(name)) is None:
            raise BridgeError("the archive has no data for its tensor")
        at, size = entry.header_offset, entry.file_size
        if at < 0 or at + _HEADER > self._length or (head := self._read(at, _HEADER))[:4] != b"PK\3\4":
            raise BridgeError(f"damaged zip archive (entry at {at})")
        start = at + _HEADER + sum(struct.unpack_from("<HH", head, 26))  # the name, and an extra field
        if start + size > self._length:
            raise BridgeError(f"damaged zip archive ({size} bytes at {start} in {self._length}): truncated?")
        return start, size

    def content(self, name: str, most: int) -> bytes:
        start, size = self.span(name)
        if size > most:
            raise BridgeError(f"damaged archive (an entry of {size} bytes)")
        return self._read(start, size)


class Archive:
    """The archive of one tensor to be written: everything around the tensor's bytes.
    Archives that start at multiples of 64 have their tensors there, too."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raises BridgeError for a dtype that it cannot write."""
        self._shape, self._dtype = shape, dtype
        head, tail = self.frame(0)
        self.data_bytes = math.prod(shape) * dtype.itemsize
        self.head_bytes = len(head)  # before the tensor; a multiple of 64
        self.total_bytes = len(head) + self.data_bytes + len(tail)

    def frame(self, crc: int) -> tuple[bytes, bytes]:
        """What comes before and after the tensor's bytes, which have this CRC-32."""
        return _frame(self._shape, self._dtype, crc)


@lru_cache(maxsize=1024)  # layers look alike
def _frame(shape: tuple[int, ...], dtype: torch.dtype, crc: int) -> tuple[bytes, bytes]:
    if dtype not in _STORAGES:
        raise BridgeError(f"{dtype} cannot be written to DCP; allowed: {', '.join(map(str, _STORAGES))}")
    pickled, out, count = io.BytesIO(), io.BytesIO(), math.prod(shape)
    stride = tuple(max(1, step) for step in contiguous_stride(shape))
    _Pickler(pickled, protocol=2).dump(Tensor(_Storage(dtype, "0", count), 0, shape, stride))
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in (
            ("data.pkl", pickled.getvalue()),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
        data = zipfile.ZipInfo("archive/data/0")
        data.CRC, data.file_size, data.compress_size = crc, count * dtype.itemsize, count * dtype.itemsize
        data.header_offset = out.tell()
        pad = -(out.tell() + _HEADER + len(data.filename) + 4) % ALIGNMENT
        # An extra field that readers skip; torch.save pads in the same way.
        data.extra = b"FB" + struct.pack("<H", pad) + bytes(pad)
        out.write(data.FileHeader())
        archive.start_dir = out.tell()
        archive.filelist.append(data)
    head, tail = out.getvalue()[: archive.start_dir], out.getvalue()[archive.start_dir :]
    # The last record says where the directory starts: behind the tensor, which zipfile was not given.
    return head, tail[:-6] + struct.pack("<I", len(head) + data.file_size) + tail[-2:]


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
