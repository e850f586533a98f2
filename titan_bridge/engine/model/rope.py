"""Rotary tables gathered once a step for all layers.

TorchTitan gives each layer its own table of all positions and looks the step's positions up in each. Serving
keeps one table for each distinct rope config and hands every layer the rows of this step in place of the
positions; the rotation has the bits of TorchTitan's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE, RoPE

from titan_bridge.engine.cpu.eager import rotate_in_one, table_for_operator
from titan_bridge.models.build import default_dtype

Rows = tuple[torch.Tensor, ...]
"""One table's rows for the tokens of a step: (cos, sin) of half the head's width; before them the complex rows, if the
table has such. For a step in one operator: the table and which rows."""


def rotate_by_halves(
    query_BLNH: torch.Tensor, key_BLNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`CosSinRoPE.apply_rotary_emb` with the same products and sums, hence the same bits.

    It does not make the turned copies of query and key in float32, so that a compiler has one loop for both.
    """

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([(a * cos - b * sin).type_as(x), (b * cos + a * sin).type_as(x)], dim=-1)

    return rotate(query_BLNH), rotate(key_BLNH)


def rotate_pairs(
    query_BLNH: torch.Tensor, key_BLNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ComplexRoPE.apply_rotary_emb` in real numbers, with the same bits: torch's compiler fuses no complex ones."""

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)

    return rotate(query_BLNH), rotate(key_BLNH)


def _rotate_complex(
    query_BLNH: torch.Tensor, key_BLNH: torch.Tensor, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if torch.compiler.is_compiling():
        return rotate_pairs(query_BLNH, key_BLNH, cos, sin)
    return ComplexRoPE.apply_rotary_emb(query_BLNH, key_BLNH, rows)  # fewer operators


def cut_rows(rope: RoPE, rows: torch.Tensor) -> Rows:
    """The rows of a table as the arguments that the rotation takes after query and key."""
    if type(rope) is CosSinRoPE:
        cos, _, sin, _ = rows.chunk(4, dim=-1)
        return cos, sin
    if type(rope) is ComplexRoPE:
        return rows, *torch.view_as_real(rows).unbind(-1)
    return (rows,)


_ROTATIONS = {CosSinRoPE: rotate_by_halves, ComplexRoPE: _rotate_complex}


class _Rotate(nn.Module):
    """Stands at `attention.rope`: applies rows that were gathered before, those of its own table.

    It must not index a tensor of the step: vLLM moves each `getitem` into the piece of the graph that made its
    input, so every layer would get its slices from the first piece.
    """

    def __init__(self, rope: RoPE, table: int, *, in_one: bool) -> None:
        super().__init__()
        self._apply_rotary = _ROTATIONS.get(type(rope), type(rope).apply_rotary_emb)
        self._table = table
        self._in_one = in_one

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, rows: tuple[Rows, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        in_one = self._in_one and not torch.compiler.is_compiling()
        return (rotate_in_one if in_one else self._apply_rotary)(query, key, *rows[self._table])


class StepRopes(nn.Module):
    """The distinct rope tables of a model; buffers, which vLLM keeps while weights sleep."""

    def __init__(self, model: Decoder, *, operator: bool = False) -> None:
        """Moves every layer's rope out of `model`, which must still be on meta.

        `operator`: steps that are not compiled rotate with vLLM's operator, where it knows the table.
        """
        super().__init__()
        self._operator = operator
        ropes: list[RoPE] = []
        known: dict[str, int] = {}
        for layer in model.layers.values():
            rope = layer.attention.rope
            key = (
                f"{type(rope).__qualname__} {json.dumps(rope.config.to_dict(), sort_keys=True, default=str)}"
            )
            if key not in known:
                known[key] = len(ropes)
                ropes.append(rope)
            layer.attention.rope = _Rotate(rope, known[key], in_one=self._in_one(rope))
        self._ropes = nn.ModuleList(ropes)

    def fill(self, device: torch.device) -> None:
        """Compute the tables (float32 or complex64) on `device`, whatever the model's dtype."""
        with default_dtype(torch.float32):
            for rope in self._tables():
                rope._init_self_buffers(buffer_device=device)

    def gather(self, positions_T: torch.Tensor) -> tuple[Rows, ...]:
        """The rows of each table for `positions_T` (int, this step's tokens), shaped for broadcast over heads.

        It takes the place of the positions that TorchTitan hands from layer to layer.
        """
        compiling = torch.compiler.is_compiling()
        return tuple(
            table_for_operator(rope.cache, positions_T)
            if self._in_one(rope) and not compiling
            else cut_rows(
                rope,
                rope._reshape_cache(
                    rope.cache.new_empty((1, positions_T.shape[0], 1, rope.config.dim)),
                    positions_T.unsqueeze(0),
                ),
            )
            for rope in self._tables()
        )

    def _in_one(self, rope: RoPE) -> bool:
        return self._operator and type(rope) is CosSinRoPE

    def _tables(self) -> Iterable[RoPE]:
        return cast("Iterable[RoPE]", self._ropes)
