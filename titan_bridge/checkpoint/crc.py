"""CRC-32 of a whole from the CRC-32s of its parts, so that parts can be written in any order."""

from __future__ import annotations

from functools import cache

_POLYNOMIAL = 0xEDB88320  # reflected, as zlib and zip use it
_Matrix = tuple[int, ...]
"""32 columns over GF(2)."""


def combine(first: int, second: int, length: int) -> int:
    """CRC-32 of a text followed by another, from both CRCs and the length in bytes of the second.

    Appending a byte of zeros is linear in the CRC, so appending `length` of them is a power of one matrix.
    """
    bit = 0
    while length:
        if length & 1:
            first = _times(_zeros(bit), first)
        length >>= 1
        bit += 1
    return first ^ second


@cache
def _zeros(bit: int) -> _Matrix:
    """What `2 ** bit` bytes of zeros do to a CRC."""
    if bit == 0:
        step: _Matrix = (_POLYNOMIAL, *(1 << i for i in range(31)))  # one bit of zero
        for _ in range(3):
            step = tuple(_times(step, column) for column in step)
        return step
    half = _zeros(bit - 1)
    return tuple(_times(half, column) for column in half)


def _times(matrix: _Matrix, vector: int) -> int:
    result, i = 0, 0
    while vector:
        if vector & 1:
            result ^= matrix[i]
        vector >>= 1
        i += 1
    return result
