"""Quantized Hugging Face checkpoints, presented as if they were not: values are multiplied out where they are read.

- fp8 (DeepSeek-V3): `NAME` [R, C] in float8_e4m3fn and `NAME_scale_inv`, a scale for each block of 128 x 128.
- mxfp4 (gpt-oss): `NAME_blocks` [E, R, C / 32, 16] of bytes with two values each, the first in the low bits, and
  `NAME_scales` [E, R, C / 32], exponents biased by 127. `NAME` is the transpose of the last two dims, [E, C, R].

Only the blocks that a read touches come from the files. The product is float32, cast once to what is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.errors import BridgeError
from titan_bridge.models import quantization
from titan_bridge.models.quantization import MXFP4_GROUP, Quantization
from titan_bridge.sharding.boxes import Box, contiguous_stride
from titan_bridge.sharding.moves import Window, cut
from titan_bridge.sharding.tensors import Chunk, TensorMetadata

_PIECE = 1 << 20  # most values multiplied out at a time
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_PAIRS = torch.tensor([[_FP4[byte & 15], _FP4[byte >> 4]] for byte in range(256)])
"""The two values of each byte."""


@dataclass(frozen=True, kw_only=True)
class ComputedCheckpoint(Checkpoint):
    """`raw`, a Hugging Face checkpoint, with some tensors computed where they are read."""

    raw: Checkpoint
    compute: Mapping[str, Callable[[Box], torch.Tensor]]
    """By name of such a tensor: what makes a box of it, in float32, contiguous."""
    order: tuple[int, ...] = (0, 1)  # for each dim of such a tensor, how far out it stands in the file

    def fetch_window(self, stored: TensorMetadata, chunk: Chunk, window: Window, out: torch.Tensor) -> None:
        if stored.name not in self.compute:
            self.raw.fetch_window(stored, chunk, window, out)
            return
        if not math.prod(window.size):
            return
        # A step along each dim of the window, in coordinates of the tensor: along one dim of it.
        origin, *ahead = (
            np.array(np.unravel_index(window.offset + (step if n > 1 else 0), stored.shape))
            for n, step in [(1, 0), *zip(window.size, window.stride, strict=True)]
        )
        steps = np.array([place - origin for place in ahead]).reshape(len(ahead), len(origin))
        # Along the outermost dim of the file first, so that a piece lies together there.
        far_out = np.array(self.order)[steps.argmax(axis=1)]
        order = sorted(range(len(ahead)), key=lambda i: (far_out[i], -window.stride[i]))
        for index in cut(window.size, order, _PIECE):
            size = tuple(part.stop - part.start for part in index)
            first = origin + np.array([part.start for part in index]) @ steps
            last = first + (np.array(size) - 1) @ steps
            box = Box(start=tuple(first.tolist()), stop=tuple((last + 1).tolist()))
            stride = tuple((steps @ np.array(contiguous_stride(box.shape))).tolist())
            values = self.compute[stored.name](box)
            out[index].copy_(Window(size=size, stride=stride, offset=0).of(values))


def _fp8(raw: Checkpoint, how: Quantization, values_name: str, scales_name: str, box: Box) -> torch.Tensor:
    values = raw.read(values_name, box).float()
    start = tuple(a // n for a, n in zip(box.start, how.block, strict=True))
    stop = tuple(-(-b // n) for b, n in zip(box.stop, how.block, strict=True))
    scales = raw.read(scales_name, Box(start=start, stop=stop)).float()
    for dim, n in enumerate(how.block):
        skipped = box.start[dim] - start[dim] * n
        scales = scales.repeat_interleave(n, dim).narrow(dim, skipped, box.shape[dim])
    return values.mul_(scales)


def _mxfp4(raw: Checkpoint, how: Quantization, values_name: str, scales_name: str, box: Box) -> torch.Tensor:
    (expert, column, row), (last_expert, last_column, last_row) = box.start, box.stop
    group, last_group = column // MXFP4_GROUP, -(-last_column // MXFP4_GROUP)
    start, stop = (expert, row, group), (last_expert, last_row, last_group)
    bytes_ = raw.read(values_name, Box(start=(*start, 0), stop=(*stop, MXFP4_GROUP // 2)))
    exponents = raw.read(scales_name, Box(start=start, stop=stop)).int() - 127
    values = _PAIRS.index_select(0, bytes_.flatten().int()).view(*bytes_.shape[:3], MXFP4_GROUP)
    torch.ldexp(values, exponents.unsqueeze(-1), out=values)
    skipped = column - group * MXFP4_GROUP
    return values.flatten(2).narrow(2, skipped, last_column - column).transpose(1, 2).contiguous()


def dequantized(checkpoint: Checkpoint, config: Mapping[str, Any] | None, said_by: object) -> Checkpoint:
    """A Hugging Face checkpoint with full weights: itself, unless its config.json says that it is quantized.
    `said_by` names the config in messages.
    Raises BridgeError: a quantization that is not read, or values and scales that do not belong together."""
    config = config or {}
    how = quantization.read(config, str(said_by))
    if how is None:
        return checkpoint
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
    if dtype is None:
        raise BridgeError(f"{said_by}: dtype is not one of {', '.join(_DTYPES)}")
    held, tensors, compute = checkpoint.tensors, {}, {}
    values_end, scales_end, computed, order = "_blocks", "_scales", _mxfp4, (0, 2, 1)
    if how.method == "fp8":
        values_end, scales_end, computed, order = "", "_scale_inv", _fp8, (0, 1)
    for stored in held.values():
        name = stored.name.removesuffix(values_end)
        if stored.name.endswith(scales_end):
            if (values := stored.name.removesuffix(scales_end) + values_end) not in held:
                raise BridgeError(f"{checkpoint.path}: {stored.name} has no {values}")
        elif stored.name.endswith(values_end) and name + scales_end in held:
            shape = _result_shape(checkpoint, how, stored, held[name + scales_end])
            chunks = tuple(replace(chunk, box=Box.whole(shape)) for chunk in stored.chunks)
            tensors[name] = TensorMetadata(name=name, shape=shape, dtype=dtype, chunks=chunks)
            compute[name] = partial(computed, checkpoint, how, stored.name, name + scales_end)
        elif stored.dtype.itemsize == 1:
            raise BridgeError(f"{checkpoint.path}: {stored.name} has dtype {stored.dtype} and no scales")
        else:
            tensors[stored.name] = stored
    return ComputedCheckpoint(
        path=checkpoint.path,
        format=checkpoint.format,
        tensors=tensors,
        config=without_quantization(config),
        pool=checkpoint.pool,
        raw=checkpoint,
        compute=compute,
        order=order,
    )


def without_quantization(config: Mapping[str, object]) -> dict[str, object]:
    """config.json for the same weights in full."""
    return {key: value for key, value in config.items() if key != quantization.KEY}


def _result_shape(
    checkpoint: Checkpoint, how: Quantization, values: TensorMetadata, scales: TensorMetadata
) -> tuple[int, ...]:
    found = f"{values.name} {values.dtype} {values.shape} with {scales.dtype} {scales.shape}"
    given = f"{checkpoint.path}: {found}"
    if how.method == "fp8":
        wanted = tuple(-(-size // n) for size, n in zip(values.shape, how.block, strict=False))
        if values.dtype != torch.float8_e4m3fn or len(values.shape) != 2 or scales.shape != wanted:
            raise BridgeError(f"{given}; fp8 needs float8_e4m3fn and scales of shape {wanted}")
        if scales.dtype not in (torch.float32, torch.bfloat16):
            raise BridgeError(f"{given}; fp8 needs scales in float32 or bfloat16")
        return values.shape
    fits = len(values.shape) == 4 and values.shape[3] == MXFP4_GROUP // 2 and scales.shape == values.shape[:3]
    if not fits or {values.dtype, scales.dtype} != {torch.uint8}:
        shapes = "values of shape (E, R, G, 16) and scales of shape (E, R, G)"
        raise BridgeError(f"{given}; mxfp4 needs uint8, {shapes}")
    experts, rows, groups, _ = values.shape
    return experts, groups * MXFP4_GROUP, rows
