"""The trainer's side of a transfer, without vLLM: every trainer rank makes one. See `protocol` for what it does.

Whatever goes wrong before an update is decided ends in no change and one error on every rank, and the next update makes
new connections by itself.
"""

from __future__ import annotations

import dataclasses
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import nn

from titan_bridge.errors import BridgeError
from titan_bridge.transfer.coordinator import Coordinator
from titan_bridge.transfer.engines import Engines
from titan_bridge.transfer.errors import TransferError, described
from titan_bridge.transfer.fingerprints import of_messages
from titan_bridge.transfer.layouts import Sides
from titan_bridge.transfer.messages import Bucket, messages
from titan_bridge.transfer.options import Client, Options, Report
from titan_bridge.transfer.ranks import Ranks
from titan_bridge.transfer.sender import Sender, Way
from titan_bridge.transfer.snapshot import Delta, Snapshot
from titan_bridge.transfer.source import Tensors, TensorSource
from titan_bridge.transfer.wire import Deadline, Listener

Worker = tuple[str, int]
"""(link, number of the worker)"""


@dataclasses.dataclass(frozen=True)
class Sending:
    """An update on its way; see `Trainer.send`."""

    _future: Future[Report]

    @property
    def done(self) -> bool:
        """Whether `wait` returns at once."""
        return self._future.done()

    def wait(self) -> Report:
        """The report, once the engines serve the weights. Raises what `Trainer.send` would have raised."""
        return self._future.result()


class Trainer:
    """One trainer rank. All ranks call the same methods in the same order."""

    def __init__(
        self,
        model: nn.Module | Tensors | Callable[[], Tensors] | TensorSource,
        engines: str | Client | Any | Sequence[Any],
        *,
        options: Options | None = None,
        rank: int | None = None,
        world: int | None = None,
        filter: Callable[[str], bool] | None = None,
        rename: Callable[[str], str] | None = None,
        adapter: str | None = None,
    ) -> None:
        """Listens for engines; nothing is sent, and no engine is asked, before the first `send` or `connect`.

        Args:
            model: What is sent; see `TensorSource`, as for `filter` and `rename`.
            engines: One or several; see `Engines.add`. Used on rank 0.
            rank: This trainer rank, else that of torch.distributed, or 0 where it is not initialized.
            world: How many ranks, likewise.
            adapter: Send the LoRA matrices (`NAME.lora_a.weight`, `NAME.lora_b.weight`) and nothing else, into the
                adapter that the engines have loaded under this name; its alpha is the model's, if that is a module.

        Raises:
            BridgeError: Several ranks without torch.distributed, or something that is no engine.
            TransferError: The address cannot be listened at.
        """
        on = dist.is_available() and dist.is_initialized()
        self.rank = (dist.get_rank() if on else 0) if rank is None else rank
        self.world = (dist.get_world_size() if on else 1) if world is None else world
        if self.world > 1 and not on:
            raise BridgeError(
                f"{self.world} trainer ranks need torch.distributed; call init_process_group first"
            )
        self.options = o = options or Options()
        given = isinstance(model, TensorSource)
        if given and (filter or rename):
            raise BridgeError("a TensorSource has its own filter and rename; give them to it")
        source = model if given else TensorSource(model, rank=self.rank, filter=filter, rename=rename)
        self.source = source if adapter is None else source.adapter()
        self.engines = Engines(engines if isinstance(engines, list | tuple) else [engines])
        host = o.host or _own_address(self.engines)
        told: list[Any] = []
        if self.rank == 0:
            secret = secrets.token_hex(32)
            self._listener = Listener(host, o.port, bytes.fromhex(secret))
            told = [secrets.token_hex(8), secret, (host, self._listener.port)]
        if self.world > 1:
            told = told or [None] * 3
            dist.broadcast_object_list(told)
        run, secret, first = told
        if self.rank:
            self._listener = Listener(host, o.port and o.port + self.rank, bytes.fromhex(secret))
        self._ranks = Ranks(self.rank, self.world, self._listener, first, bytes.fromhex(secret), run)
        lora = {"adapter": adapter, "scaling": source.scaling()} if adapter is not None else None
        self._coordinator = Coordinator(self.engines, self._listener, o, secret, run, lora)
        self._sender = Sender(o.transport)
        self._ways: dict[str, dict[Worker, Way]] = {}
        """By link."""
        self._said: dict[str, tuple] | None = None
        """Signature of the source when its layout was told."""
        self._snapshot: tuple[int | None, Snapshot] = (None, Snapshot())
        """The update whose weights it has, if that is known."""
        self._planned: tuple[tuple[Any, ...], dict[int, tuple[Bucket, ...]]] | None = None
        self._committed = 0
        self._sending: Future[Report] | None = None
        self._thread = ThreadPoolExecutor(1, "titan-send")
        """Of updates that nobody waits for; begins with the first of them."""

    @property
    def buffer_bytes(self) -> int:
        """Memory that this rank holds for sending: at most two buckets."""
        return self._sender.buffer_bytes

    # What users call

    def connect(self) -> None:
        """Meet the engines now instead of in the first update.

        Raises:
            BridgeError: The two sides do not fit together.
            TransferError: An engine is busy with another trainer, or somebody did not come within the time.
        """
        self._together(self._meet)

    @overload
    def send(
        self, version: str | int | None = ..., *, whole: bool = ..., wait: Literal[True] = ...
    ) -> Report: ...
    @overload
    def send(
        self, version: str | int | None = ..., *, whole: bool = ..., wait: Literal[False]
    ) -> Sending: ...
    def send(
        self, version: str | int | None = None, *, whole: bool = False, wait: bool = True
    ) -> Report | Sending:
        """Bring the weights as they are now into all engines: what has changed where that is less, else all of it.

        Args:
            version: Name of these weights; else "1", "2", ...
            whole: Send all, whatever has changed.
            wait: Return when the engines serve them; else at once, with a handle. The tensors must not change before
                its `wait` has returned; other calls wait for it, too.

        Raises:
            TransferError: Nothing changed in the engines; the reason.
            BridgeError: The source's tensors are not those of the first update.
        """
        started = time.monotonic()
        if wait:
            return self._together(lambda limit: self._send(version, whole, started, limit))
        self._finish_sending()
        self._sending = self._thread.submit(
            self._call, lambda limit: self._send(version, whole, started, limit)
        )
        return Sending(self._sending)

    def verify(self) -> int:
        """Compare what the engines have, on every worker, with the weights as they are now, by fingerprints.

        Returns:
            How many tensors of workers were compared.

        Raises:
            TransferError: The tensors that differ, by worker.
        """
        answer = self._together(self._verify)
        if differ := answer["differ"]:
            worker, names = next(iter(differ.items()))
            more = sum(map(len, differ.values())) - 1
            raise TransferError(
                f"{names[0]} on {worker} is not what the trainer has ({more} more such tensors)"
            )
        return answer["compared"]

    def close(self) -> None:
        """Leave the engines to another trainer: a worker whose connection ends is free."""
        self._finish_sending()
        self._thread.shutdown()
        self._forget()
        self._ranks.close()
        self._listener.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The steps of one call; `protocol` has their order

    def _together(self, action: Callable[[Deadline], Any]) -> Any:
        self._finish_sending()
        return self._call(action)

    def _finish_sending(self) -> None:
        """Calls are one after the other; what became of one in the background is said by its own `wait`."""
        if self._sending is not None:
            self._sending.exception()

    def _call(self, action: Callable[[Deadline], Any]) -> Any:
        """A call of all ranks; after a fault, connections are made anew."""
        self._ranks.begin()
        try:
            with torch.no_grad():
                return action(Deadline(self.options.seconds))
        except Exception as error:
            if not isinstance(error, BridgeError):
                self._forget()
            raise

    def _meet(self, limit: Deadline) -> dict[str, Any]:
        """Step 1: all ranks know the engines, and have their connections."""
        said, layout, problem = None, None, None
        try:
            said = self.source.signature()
            if self._said is None:
                layout = self.source.layout().to_json()
            elif said != self._said:
                raise BridgeError("the tensors are not those of the first update; make a new Trainer")
        except BridgeError as error:
            problem = self._named(error)
        links = [
            link for link, ways in self._ways.items() if all(way.connection.alive() for way in ways.values())
        ]
        mine = {
            "address": f"{self._listener.host}:{self._listener.port}",
            "layout": layout,
            "problem": problem,
            "links": links,
            "base": self._snapshot[0],
        }
        answer = self._ranks.exchange(mine, lambda given: self._coordinator.meet(given, limit), limit)
        self._said = said
        there = {engine["link"] for engine in answer["engines"]}
        for link in set(self._ways) - there:
            self._leave(link)
        for engine in answer["engines"]:
            if engine["sides"] is not None:
                self._ways[engine["link"]] = self._join(engine["link"], engine["sides"], limit)
        return answer

    def _join(self, link: str, sides: Mapping[str, Any], limit: Deadline) -> dict[Worker, Way]:
        made = Sides.from_json(sides)
        if self._planned is None or self._planned[0] != (made, self.options.bucket_bytes):
            dtypes = {name: param.dtype for name, param in made.destination.params.items()}
            most = self.options.bucket_bytes
            out = messages(self._coordinator.plan_of(made), dtypes, sender=self.rank, bucket_bytes=most)
            self._planned = ((made, most), {peer - made.trainers: buckets for peer, buckets in out.items()})
        out = self._planned[1]
        found = self._listener.take(
            lambda hello: hello["role"] == "data" and hello["link"] == link, count=len(out), deadline=limit
        )
        by_worker = {connection.hello["worker"]: connection for connection in found}
        return {(link, at): Way(connection=by_worker[at], buckets=buckets) for at, buckets in out.items()}

    def _send(self, version: str | int | None, whole: bool, started: float, limit: Deadline) -> Report:
        name = str(self._committed + 1 if version is None else version)
        met = self._meet(limit)
        deltas: dict[Worker, Delta] = {}
        local, problem = {}, None
        try:
            local = self.source.local()
            if not whole and met["base"] is not None and met["base"] == self._snapshot[0]:
                able = {engine["link"] for engine in met["engines"] if engine["delta"]}
                deltas = self._snapshot[1].deltas(local, self._buckets(able))
        except Exception as error:
            problem = self._named(error)
        kinds = {
            link: {str(at): "delta" if (link, at) in deltas else "whole" for _, at in ways}
            for link, ways in self._ways.items()
        }
        mine = {"kinds": kinds, "problem": problem, "base": met["base"]}
        going = self._ranks.exchange(mine, lambda given: self._coordinator.prepare(given, limit), limit)
        ways = {worker: way for link in going["links"] for worker, way in self._ways[link].items()}
        outcome = self._sender.send(ways, local, deltas, met["number"], limit)
        sent = {link: {str(at): outcome[link, at] for _, at in self._ways[link]} for link in going["links"]}
        kind = "whole" if any(worker not in deltas for worker in ways) else "delta"
        told = self._ranks.exchange(
            {"sent": sent, "kind": kind}, lambda given: self._coordinator.commit(given, name, limit), limit
        )
        self._committed += 1
        if self.options.delta:
            self._snapshot[1].take(local, self._buckets(self._ways).values())
            self._snapshot = (told["number"], self._snapshot[1])
        fields = {key: value for key, value in told.items() if key != "number"}
        return Report(seconds=time.monotonic() - started, **fields)

    def _verify(self, limit: Deadline) -> dict[str, Any]:
        self._meet(limit)
        local = self.source.local()
        found = {
            link: {str(at): of_messages({self.rank: way.buckets}, local) for (_, at), way in ways.items()}
            for link, ways in self._ways.items()
        }
        mine = {"fingerprints": found}
        return self._ranks.exchange(mine, lambda given: self._coordinator.verify(given, limit), limit)

    def _buckets(self, links: Any) -> dict[Worker, Sequence[Bucket]]:
        return {worker: way.buckets for link in links for worker, way in self._ways[link].items()}

    def _named(self, error: Exception) -> str:
        text = described(error)
        return f"trainer rank {self.rank}: {text}" if self.world > 1 else text

    def _leave(self, link: str) -> None:
        for way in self._ways.pop(link).values():
            way.close()

    def _forget(self) -> None:
        """Cut all connections with engines; what they have is not known."""
        for link in list(self._ways):
            self._leave(link)
        self._snapshot = (None, self._snapshot[1])
        self._coordinator.close()


def _own_address(engines: Engines) -> str:
    """Of this host, as the first engine sees it."""
    host = next((getattr(engine.client, "address", None) for engine in engines.all()), None)
    if host is None:
        return "127.0.0.1"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise BridgeError(
            f"the engine's host {host} is not known here ({error}); give Options(host=...)"
        ) from None
