"""What one trainer rank sends: to every worker its messages, all workers at once.

A window that is contiguous and of the wire's dtype already is sent from where it lies. Others are packed into one of
`BUFFERS` buckets of its engine's, which are all the memory that sending takes beside the tensors themselves; an engine
that takes nothing keeps no other from its own.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from titan_bridge.transfer.errors import PeerLost, described
from titan_bridge.transfer.messages import Bucket
from titan_bridge.transfer.snapshot import Delta, Local
from titan_bridge.transfer.transports import Tcp, offer
from titan_bridge.transfer.wire import Connection, Deadline, at_once

BUFFERS = 2


@dataclass(kw_only=True)
class Way:
    """From this rank to one worker."""

    link: str = ""  # of the worker's engine
    connection: Connection
    buckets: Sequence[Bucket]
    transport: Tcp | None = None  # agreed on in the first update

    def close(self) -> None:
        (self.transport or self.connection).close()


class Sender:
    """Sends the tensors of one trainer rank, again and again; keeps its buffers."""

    def __init__(self, transport: str = "tcp") -> None:
        """`transport`: as `Options.transport`."""
        self._transport = transport
        self._free: dict[str, queue.Queue[torch.Tensor]] = {}  # by link

    @property
    def buffer_bytes(self) -> int:
        """Memory held beside the tensors, between updates: at most two buckets for each engine."""
        return sum(buffer.nbytes for free in self._free.values() for buffer in free.queue)

    def send(
        self, ways: Mapping[str, Way], local: Local, deltas: Mapping[str, Delta], number: int, limit: Deadline
    ) -> dict[str, int | str]:
        """Send update `number` of `local` (local tensors by name) to every worker: its delta if there is one, else all.

        Returns the bytes that each worker was sent, or why it was not sent all of them.
        """
        sent: dict[str, int | str] = {}
        self._free = {way.link: self._free.get(way.link) or _buffers() for way in ways.values()}

        def one(to: str) -> None:
            way, delta = ways[to], deltas.get(to)
            if way.transport is None:
                device = local[way.buckets[0].slices[0].name].device
                way.transport = offer(way.connection, self._transport, device, limit)
            way.connection.send({"number": number, "kind": "whole" if delta is None else "delta"}, limit)
            if delta is None:
                for bucket in way.buckets:
                    self._send(bucket, way.transport, local, self._free[way.link], limit)
            else:
                for tensor in delta.tensors():
                    way.transport.send(tensor, limit)
            way.transport.finish(limit)
            if limit.over:
                raise PeerLost(f"{way.connection.peer} did not take all of it within the time limit")
            sent[to] = sum(bucket.nbytes for bucket in way.buckets) if delta is None else delta.nbytes

        return sent | {to: described(error) for to, error in at_once(one, ways).items()}

    def _send(
        self, bucket: Bucket, transport: Tcp, local: Local, free: queue.Queue[torch.Tensor], limit: Deadline
    ) -> None:
        tensors, device = [local[part.name] for part in bucket.slices], transport.device
        first = tensors[0]
        as_is = bucket.run is not None and (first.dtype, first.device) == (bucket.dtype, device)
        if as_is and first.is_contiguous():
            transport.send(first.view(-1)[bucket.run], limit)
            return
        try:
            buffer = free.get(timeout=limit.left)
        except queue.Empty:
            raise PeerLost("others of this engine's workers took nothing within the time limit") from None
        try:
            if buffer.nbytes < bucket.nbytes or buffer.device != device:
                pin = first.device.type == "cuda" != device.type
                buffer = torch.empty(bucket.nbytes, dtype=torch.uint8, device=device, pin_memory=pin)
            message = buffer[: bucket.nbytes].view(bucket.dtype)
            for part, tensor in zip(bucket.slices, tensors, strict=True):
                window = part.window.of(tensor.contiguous())
                message[part.at : part.at + part.elements].view(part.window.size).copy_(window)
            transport.send(message, limit)
        finally:
            free.put(buffer)


def _buffers() -> queue.Queue[torch.Tensor]:
    free: queue.Queue[torch.Tensor] = queue.Queue()
    for _ in range(BUFFERS):
        free.put(torch.empty(0, dtype=torch.uint8))
    return free
