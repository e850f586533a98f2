"""torch's placement classes, looked up when one is first used.

Importing `torch.distributed.tensor` takes most of a second on top of torch, and what goes from files to files has no
placements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

__all__ = ["Placement", "Replicate", "Shard", "_StridedShard"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch.distributed.tensor import placement_types  # noqa: PLC0415  see above

    globals().update({known: getattr(placement_types, known) for known in __all__})
    return globals()[name]
