"""One number for a tensor, whatever layout, file format or order its parts come in.

The number is a sum modulo 2^64 over the tensor's bytes, so the parts that ranks or files hold are summed up apart and
added (`partial`, `combine`); integers only, so the order changes nothing. It sees the bits of each element at its
row-major place in the global tensor: -0.0 is not 0.0, and a NaN equals itself.

    sum over rows, blocks:  R(row, block) * sum over columns n:  V(n) * sum over bytes p:  T(p, n) * byte(row, block, p)

A row is the last dim; a block is a part of it, 4096 bytes at most. `T` (small integers, 8 columns), `V` and `R`
(64 bits, odd) are constants that look random. The inner sum is an exact int8 matrix product, which takes little longer
than reading the bytes. How probable it is that two different tensors have one number, over the choice of constants:

- all 8 inner sums of a block agree though its bytes do not: 2^-6 * 2^-49 = 2^-55 (never where one byte differs, since
  column 0 of `T` is odd);
- they differ, by multiples of 2^7 at worst (signs only), and the sum over columns agrees, or those of several blocks
  cancel each other: 2^-57 for each of the 57 bits that are left.

Together less than 2^-50, for weights that nobody made to collide: the constants are public.

`seal` adds shape and dtype, so the same values in two dtypes have two fingerprints. To compare a float32 trainer with
a bfloat16 engine, give `dtype`: each element is cast first (torch's rounding, to the nearest even).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import torch

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.boxes import Box, contiguous_stride
from titan_bridge.sharding.moves import Copy, Window
from titan_bridge.sharding.plan import Plan
from titan_bridge.sharding.tensors import Owner

_MOST = 4096
"""Bytes of a row that one inner sum takes at most: |sum| <= 4096 * 64 * 128 fits int32."""
_COLUMNS = 8
_CHUNK = {"cpu": 1 << 25, "other": 1 << 26}
"""Bytes looked at together: enough that the thirty operations on a chunk cost little beside it."""
_CACHED = 1 << 19
"""Bytes that a core's cache still has when the next operation reads them."""
_MASK = (1 << 64) - 1


def fingerprint(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> int:
    """Of a whole tensor (any strides, any device), 0 to 2^64 - 1; cast to `dtype` first where one is given."""
    shape = tuple(tensor.shape)
    return seal(of_box(tensor, Box.whole(shape), shape, dtype), shape, dtype or tensor.dtype)


def seal(total: int, shape: Sequence[int], dtype: torch.dtype) -> int:
    """The fingerprint, from the sum over all parts of a tensor of this (global) shape and dtype."""
    what = hashlib.blake2b(f"{dtype} {list(shape)}".encode(), digest_size=8).digest()
    return combine((total, int.from_bytes(what, "little")))


def combine(partials: Iterable[int]) -> int:
    """The sum of what `partial` gave for disjoint parts. As int64, `all_reduce(SUM)` does the same."""
    return sum(partials) & _MASK


def of_box(part: torch.Tensor, box: Box, shape: Sequence[int], dtype: torch.dtype | None = None) -> int:
    """`partial` of a tensor that is the `box` of a global tensor of `shape`."""
    return partial(part, Window.of_box(box, shape), shape, dtype)


def of_plan(
    made: Plan,
    source: Owner,
    local: Callable[[Copy], torch.Tensor],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, int]:
    """Sums of what one owner has of every tensor of a plan whose destinations are whole (`TensorMetadata.whole`).

    The plan takes each element from one of its replicas, so the sums of all owners add up to each tensor once; views
    between the two sides' names and shapes are the plan's.

    Args:
        made: Destinations are what is to be compared, by name.
        source: The rank (or file) that this process stands for.
        local: The source's local tensor that a copy reads.
        dtypes: By destination name, where elements are cast first.

    Returns:
        By destination name; names that this owner has nothing of are left out.
    """
    sums: dict[str, int] = {}
    shapes = shapes_of(made)
    for copy in made.copies(source=source):
        name, window = copy.destination_name, copy.destination_window
        part = copy.source_window.of(local(copy))
        found = partial(part, window, shapes[name], (dtypes or {}).get(name))
        sums[name] = combine((sums.get(name, 0), found))
    return sums


def partial(
    part: torch.Tensor, window: Window, shape: Sequence[int], dtype: torch.dtype | None = None
) -> int:
    """The sum over a part of a global tensor.

    Args:
        part: Shape `window.size`, any strides, on any device.
        window: Where its elements stand: strides and offset in the contiguous global tensor, in elements. No window
            dim goes over the end of a row.
        shape: Of the global tensor.
        dtype: Cast to it first.

    Returns:
        0 to 2^64 - 1; add the sums of disjoint parts with `combine`.
    """
    if tuple(part.shape) != window.size:
        raise BridgeError(f"a part of shape {tuple(part.shape)} for a window of size {window.size}")
    if not part.numel():
        return 0
    width = shape[-1] if shape else 1
    order = sorted(
        (d for d, n in enumerate(window.size) if n != 1), key=lambda d: window.stride[d], reverse=True
    )
    part = part.detach().permute([*order, *(d for d in range(part.ndim) if d not in order)])
    part = part.reshape([window.size[d] for d in order])
    index = [window.stride[d] for d in order]
    rows = [d for d, s in enumerate(index) if s >= width]
    if any(index[d] % width for d in rows):
        raise BridgeError(f"window {window} does not follow the rows of {tuple(shape)}")
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    row, column = divmod(window.offset, width)
    steps = [index[d] // width for d in rows]
    dtype = dtype or part.dtype
    for some, at in _chunks(part, _CHUNK.get(part.device.type, _CHUNK["other"]) // dtype.itemsize):
        first = row + sum(at[d] * step for d, step in enumerate(steps))
        begin = column + sum(a * s for a, s in zip(at[len(rows) :], index[len(rows) :], strict=True))
        numbers = _numbers(first, some.shape[: len(rows)], steps, part.device)
        laid = _in_rows(some, index[len(rows) :], len(numbers))
        total += _sum(laid, dtype, begin, numbers, width)
    return int(total) & _MASK


def shapes_of(made: Plan) -> dict[str, tuple[int, ...]]:
    """Global shapes of the plan's destinations."""
    return {item.destination.name: item.destination.shape for group in made.groups for item in group.items}


def _chunks(part: torch.Tensor, most: int) -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
    """Pieces of at most `most` elements, cut along the first dims, with their starts."""
    if part.numel() <= most:
        yield part, (0,) * part.ndim
        return
    each = max(1, most // part[0].numel())
    for start in range(0, len(part), each):
        some = part[start : start + each]
        if some.numel() <= most:
            yield some, (start, *(0,) * (part.ndim - 1))
        else:
            for inner, at in _chunks(some[0], most):
                yield inner[None], (start, *at)


def _in_rows(part: torch.Tensor, columns: Sequence[int], rows: int) -> torch.Tensor:
    """[rows, columns], columns side by side; gaps between the columns that a window skips become zeros."""
    sizes = part.shape[part.ndim - len(columns) :]
    if tuple(columns) == contiguous_stride(sizes):
        laid = part.reshape(rows, -1)
        return laid if laid.stride(1) == 1 else laid.contiguous()
    span = 1 + sum((n - 1) * s for n, s in zip(sizes, columns, strict=True))
    out = part.new_zeros(rows, span)
    out.as_strided((rows, *sizes), (span, *columns)).copy_(part.reshape(rows, *sizes))
    return out


def _numbers(first: int, sizes: Sequence[int], steps: Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers of the rows of the global tensor, in the order of the part's."""
    numbers = torch.full((1,), first, dtype=torch.int64, device=device)
    for n, step in zip(sizes, steps, strict=True):
        numbers = (numbers[:, None] + torch.arange(n, device=device) * step).flatten()
    return numbers


def _sum(
    data_RC: torch.Tensor, dtype: torch.dtype, begin: int, rows_R: torch.Tensor, width: int
) -> torch.Tensor:
    """The sum over elements `begin` and on, cast to `dtype`, of some rows of a tensor that has `width` a row."""
    blocks = -(-width * dtype.itemsize // _MOST)
    size = -(-width * dtype.itemsize // blocks)  # bytes
    if size % dtype.itemsize:  # a block ends within an element
        data_RC = data_RC.to(dtype).view(torch.int8)
        begin, dtype = begin * dtype.itemsize, torch.int8
    size //= dtype.itemsize
    count = data_RC.shape[1]
    if begin % size == 0 and count % size == 0 and data_RC.is_contiguous():
        inside = torch.arange(begin // size, (begin + count) // size, device=data_RC.device)
        return _blocks(data_RC.view(-1, size), dtype, 0, (rows_R[:, None] * blocks + inside).flatten())
    total = rows_R.new_zeros(())
    for block in range(begin // size, -(-(begin + count) // size)):
        low, high = max(begin, block * size), min(begin + count, (block + 1) * size)
        data = data_RC[:, low - begin : high - begin]
        total += _blocks(data, dtype, low - block * size, rows_R * blocks + block)
    return total


def _blocks(data_BC: torch.Tensor, dtype: torch.dtype, first: int, numbers_B: torch.Tensor) -> torch.Tensor:
    """The sum over parts of blocks: elements `first` and on of each of the blocks with these numbers."""
    weights_PN, mixers_N = _constants(data_BC.device)
    bytes_ = slice(first * dtype.itemsize, (first + data_BC.shape[1]) * dtype.itemsize)
    product = _product if data_BC.device.type == "cpu" else _padded_product
    inner_BN = product(data_BC, dtype, weights_PN[bytes_]).to(torch.int64)
    return (inner_BN.mul_(mixers_N).sum(dim=1).mul_(_mix(numbers_B) | 1)).sum()


def _product(data_BC: torch.Tensor, dtype: torch.dtype, weights_PN: torch.Tensor) -> torch.Tensor:
    """Exact int32 product of the bytes of `data_BC`, cast to `dtype`, with an int8 matrix."""
    if data_BC.dtype == dtype:
        return torch._int_mm(data_BC.view(torch.int8), weights_PN)
    count, width = data_BC.shape
    room_BC = torch.empty(min(count, max(1, _CACHED // (width * dtype.itemsize))), width, dtype=dtype)
    product_BN = torch.empty(count, weights_PN.shape[1], dtype=torch.int32)
    for some_BC, out_BN in zip(data_BC.split(len(room_BC)), product_BN.split(len(room_BC)), strict=True):
        copy_BC = room_BC[: len(some_BC)].copy_(some_BC)
        torch._int_mm(copy_BC.view(torch.int8), weights_PN, out=out_BN)
    return product_BN


def _padded_product(data_BC: torch.Tensor, dtype: torch.dtype, weights_PN: torch.Tensor) -> torch.Tensor:
    """The same where more than 16 rows and multiples of 8 are asked for (CUDA): zeros add nothing."""
    data_BP = data_BC.to(dtype).contiguous().view(torch.int8)
    count, columns = len(data_BP), -data_BP.shape[1] % 8
    data_BP = torch.nn.functional.pad(data_BP, (0, columns, 0, max(0, 32 - count)))
    return torch._int_mm(data_BP.contiguous(), torch.nn.functional.pad(weights_PN, (0, 0, 0, columns)))[
        :count
    ]


@lru_cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """T as [bytes of a block, columns] int8 in -64 to 63, and V [columns] int64.

    Seven bits, since CPUs without int8 dot products add pairs of products in 16 bits.
    """
    random = _mix(torch.arange(-_COLUMNS * (_MOST + 1), 0)).view(_MOST + 1, _COLUMNS)
    weights = ((random[1:] >> 57) & 127) - 64
    weights[:, 0] |= 1
    return weights.to(torch.int8).to(device), (random[0] | 1).to(device)


def _mix(numbers: torch.Tensor) -> torch.Tensor:
    """64 bits that look random for each int64 number: the finaliser of splitmix64."""
    x = numbers * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
