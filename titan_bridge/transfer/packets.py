"""How a sparse update travels: a short header, then positions and values, from each trainer rank to each worker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.layout import Layout
from titan_bridge.transfer.dense import Deadline
from titan_bridge.transfer.sparse import Entries, Outbox, check_unique, index_dtype
from titan_bridge.transfer.transport import Transport

_HEADER_TAG = 1 << 20  # beyond the tags of dense buckets


def send_sparse(
    transport: Transport,
    outbox: Outbox,
    layout: Layout,
    workers: Sequence[int],
    deadline: Deadline,
    piece: int,
) -> None:
    """Send every worker its entries, none at all included.

    Args:
        layout: The destination's: both ends number its tensors the same way.
        workers: All ranks of the destination.
        piece: Most bytes of one message.
    """
    number = {name: at for at, name in enumerate(sorted(layout.params))}
    works = []
    for peer in workers:
        mine = outbox.to.get(peer, {})
        order = sorted(mine, key=number.__getitem__)
        header = [[number[name], sum(len(e.positions) for e in mine[name])] for name in order]
        blocks = [torch.tensor([len(order)]), torch.tensor(header, dtype=torch.int64).view(-1)]
        for field in ("positions", "values"):
            by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
            for name in order:
                for entries in mine[name]:
                    by_dtype.setdefault(getattr(entries, field).dtype, []).append(getattr(entries, field))
            blocks += [
                torch.cat(parts) for _, parts in sorted(by_dtype.items(), key=lambda item: str(item[0]))
            ]
        tag = _HEADER_TAG
        for block in blocks:
            for part in _cut(block.to(transport.device), piece):
                works.append((transport.send(part, peer, tag=tag), peer, part))
                tag += 1
    for work, peer, _ in works:
        transport.wait(work, seconds=deadline.left, what=f"sending patches to rank {peer}")


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """All entries of one tensor that one worker has to write."""

    name: str
    positions: torch.Tensor
    """int64, flat in the local tensor, none twice."""
    values: torch.Tensor


def receive_sparse(
    transport: Transport,
    layout: Layout,
    rank: int,
    senders: Sequence[int],
    local: Mapping[str, torch.Size],
    deadline: Deadline,
    piece: int,
) -> list[Arrived]:
    """Stage all entries for `rank` and check them.

    Args:
        local: Shapes of the live local tensors.

    Raises:
        TransferError: A sender is gone, or the time is over.
        BridgeError: An element that two patches write, or a position outside the local tensor.
    """
    names = sorted(layout.params)
    found: dict[str, list[Entries]] = {}
    for peer in senders:
        reader = _Reader(transport, peer, deadline, piece)
        (count,) = reader.read(1, torch.int64).tolist()
        header = reader.read(2 * count, torch.int64).view(-1, 2).tolist()
        tensors = [(names[at], n) for at, n in header]
        if other := [name for name, _ in tensors if name not in local]:
            raise BridgeError(
                f"{other[0]} cannot be patched: vLLM holds it in another form; send all weights"
            )
        positions = reader.split([(n, index_dtype(math.prod(local[name]))) for name, n in tensors])
        values = reader.split([(n, getattr(torch, layout.params[name].dtype)) for name, n in tensors])
        for (name, _), p, v in zip(tensors, positions, values, strict=True):
            found.setdefault(name, []).append(Entries(positions=p, values=v))
    return [stage(name, parts, math.prod(local[name])) for name, parts in found.items()]


def stage(name: str, parts: Sequence[Entries], numel: int) -> Arrived:
    """The entries of one tensor, of `numel` local elements, put together and checked; see `receive_sparse`."""
    at = torch.cat([part.positions for part in parts]).long()
    if len(at):
        low, high = torch.aminmax(at)
        if low < 0 or high >= numel:
            raise BridgeError(f"patch for {name}: a position is outside a local tensor of {numel} elements")
        check_unique(name, at)
    return Arrived(name=name, positions=at, values=torch.cat([part.values for part in parts]))


def apply_sparse(arrived: Sequence[Arrived], live: Mapping[str, torch.Tensor]) -> set[str]:
    """Scatter staged entries into the live local tensors; returns the names that were written."""
    for each in arrived:
        flat = live[each.name].view(-1)
        # Not scatter_: for bfloat16 on a CPU it takes time for every element of the tensor.
        flat.index_copy_(0, each.positions.to(flat.device), each.values.to(flat.device))
    return {each.name for each in arrived}


class _Reader:
    def __init__(self, transport: Transport, peer: int, deadline: Deadline, piece: int) -> None:
        self._transport, self._peer, self._deadline, self._piece = transport, peer, deadline, piece
        self._tag = _HEADER_TAG

    def read(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        data = torch.empty(count, dtype=dtype, device=self._transport.device)
        works = []
        for part in _cut(data, self._piece):
            works.append(self._transport.receive(part, self._peer, tag=self._tag))
            self._tag += 1
        for work in works:
            self._transport.wait(
                work, seconds=self._deadline.left, what=f"receiving patches from rank {self._peer}"
            )
        return data

    def split(self, wanted: Sequence[tuple[int, torch.dtype]]) -> list[torch.Tensor]:
        """One tensor for each (length, dtype); they travel joined by dtype."""
        totals: dict[torch.dtype, int] = {}
        for n, dtype in wanted:
            totals[dtype] = totals.get(dtype, 0) + n
        joined = {
            dtype: self.read(n, dtype) for dtype, n in sorted(totals.items(), key=lambda item: str(item[0]))
        }
        at = dict.fromkeys(totals, 0)
        result = []
        for n, dtype in wanted:
            result.append(joined[dtype][at[dtype] : at[dtype] + n])
            at[dtype] += n
        return result


def _cut(block: torch.Tensor, piece: int) -> list[torch.Tensor]:
    step = max(1, piece // block.element_size())
    return [block[first : first + step] for first in range(0, len(block), step)]
