"""What one trainer rank sends: to every worker its messages, all workers at once.

A window that is contiguous and of the wire's dtype already is sent from where it lies. Others are packed into one of
`BUFFERS` buckets, which are all the memory that sending takes beside the tensors themselves.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from titan_bridge.transfer.errors import described
from titan_bridge.transfer.messages import Bucket
from titan_bridge.transfer.snapshot import Delta, Local
from titan_bridge.transfer.transports import Tcp, offer, offered
from titan_bridge.transfer.wire import Connection, Deadline, Key, at_once

BUFFERS = 2


@dataclass(kw_only=True)
class Way:
    """From this rank to one worker."""

    connection: Connection
    buckets: Sequence[Bucket]
    transport: Tcp | None = None
    """Agreed on in the first update."""

    def close(self) -> None:
        (self.transport or self.connection).close()


class Sender:
    """Sends the tensors of one trainer rank, again and again; keeps its buffers."""

    def __init__(self, transport: str = "tcp") -> None:
        """`transport`: as `Options.transport`."""
        self._transport = transport
        self._free: queue.Queue[torch.Tensor | None] = queue.Queue()
        for _ in range(BUFFERS):
            self._free.put(None)
        self.buffer_bytes = 0
        """Memory held beside the tensors: at most two buckets."""

    def send(
        self,
        ways: Mapping[Key, Way],
        local: Local,
        deltas: Mapping[Key, Delta],
        number: int,
        deadline: Deadline,
    ) -> dict[Key, int | str]:
        """Send update `number` of `local` (local tensors by name) to every worker: its delta if there is one, else all.

        Returns the bytes that each worker was sent, or why it was not sent all of them.
        """
        sent: dict[Key, int | str] = {}

        def one(key: Key) -> None:
            way, delta = ways[key], deltas.get(key)
            if way.transport is None:
                device = local[way.buckets[0].slices[0].name].device
                way.transport = offer(way.connection, offered(self._transport, device), device, deadline)
            way.connection.send({"number": number, "kind": "whole" if delta is None else "delta"}, deadline)
            if delta is None:
                count = self._whole(way, way.transport, local, deadline)
            else:
                count = self._delta(way.transport, delta, deadline)
            way.transport.finish(deadline)
            sent[key] = count

        return sent | {key: described(error) for key, error in at_once(one, ways).items()}

    def _whole(self, way: Way, transport: Tcp, local: Local, deadline: Deadline) -> int:
        for bucket in way.buckets:
            if (data := _as_it_lies(bucket, local, transport.device)) is not None:
                transport.send(data, deadline)
                continue
            buffer = self._free.get()
            try:
                buffer = self._packed(bucket, local, buffer, transport.device)
                transport.send(buffer[: bucket.nbytes], deadline)
            finally:
                self._free.put(buffer)
        return sum(bucket.nbytes for bucket in way.buckets)

    def _delta(self, transport: Tcp, delta: Delta, deadline: Deadline) -> int:
        transport.send(delta.counts, deadline)
        for positions, values in delta.parts:
            if len(positions):
                transport.send(positions, deadline)
                transport.send(values, deadline)
        return delta.nbytes

    def _packed(
        self, bucket: Bucket, local: Local, buffer: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        tensors = [local[part.name] for part in bucket.slices]
        if buffer is None or buffer.nbytes < bucket.nbytes or buffer.device != device:
            self.buffer_bytes += bucket.nbytes - (0 if buffer is None else buffer.nbytes)
            pin = tensors[0].device.type == "cuda" != device.type
            buffer = torch.empty(bucket.nbytes, dtype=torch.uint8, device=device, pin_memory=pin)
        message = buffer[: bucket.nbytes].view(bucket.dtype)
        for part, tensor in zip(bucket.slices, tensors, strict=True):
            window = part.window.of(tensor.contiguous())
            message[part.at : part.at + part.elements].view(part.window.size).copy_(window)
        return buffer


def _as_it_lies(bucket: Bucket, local: Local, device: torch.device) -> torch.Tensor | None:
    """The message without a copy, where the bytes of a local tensor are the message."""
    tensor = local[bucket.slices[0].name]
    if bucket.run is None or tensor.dtype != bucket.dtype or tensor.device != device:
        return None
    return tensor.view(-1)[bucket.run] if tensor.is_contiguous() else None
