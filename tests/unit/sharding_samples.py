"""What the tests of the planner share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from titan_bridge.sharding import Box, Chunk, OnMesh, TensorMetadata, pieces_of

whole = TensorMetadata.whole


def boxes_of(*where: Any) -> tuple[Box, ...]:
    """Global boxes of `pieces_of`, which takes the same."""
    return tuple(piece.box for piece in pieces_of(*where))


def chunked(parts: Iterable[tuple[Any, Box]]) -> tuple[Chunk, ...]:
    return tuple(Chunk(owner=owner, box=box) for owner, box in parts)


def tensor(
    name: str, shape: tuple[int, ...], by: OnMesh | tuple[Chunk, ...], dtype: torch.dtype = torch.int64
) -> TensorMetadata:
    where = {"on": by} if isinstance(by, OnMesh) else {"chunks": by}
    return TensorMetadata(name=name, shape=shape, dtype=dtype, **where)
