"""The trainer's side of a transfer, without vLLM: every trainer rank makes one. See `protocol` for what it does.

Whatever goes wrong before an update is decided ends in no change and one error on every rank, and the next update makes
new connections by itself.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import nn

from titan_bridge.errors import BridgeError
from titan_bridge.transfer.clients import Client
from titan_bridge.transfer.coordinator import Coordinator
from titan_bridge.transfer.engines import Engines
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.fingerprints import of_messages
from titan_bridge.transfer.layouts import Sides
from titan_bridge.transfer.messages import Bucket, messages
from titan_bridge.transfer.options import Options, Report
from titan_bridge.transfer.ranks import Ranks
from titan_bridge.transfer.sender import Sender, Way
from titan_bridge.transfer.snapshot import Delta, Local, Snapshot
from titan_bridge.transfer.source import Tensors, TensorSource
from titan_bridge.transfer.wire import Deadline, Listener

Version = str | int | None


class Sending:
    """An update on its way; see `Trainer.send`."""

    def __init__(self, future: Future[Report]) -> None:
        self._future = future

    @property
    def done(self) -> bool:
        """Whether `wait` returns at once."""
        return self._future.done()

    def wait(self) -> Report:
        """The report, once the engines serve the weights. Raises what `Trainer.send` would have raised."""
        return self._future.result()


class Trainer(contextlib.AbstractContextManager):
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
            TransferError: The address of a rank cannot be listened at.
        """
        on = dist.is_available() and dist.is_initialized()
        self.rank = (dist.get_rank() if on else 0) if rank is None else rank
        self.world = (dist.get_world_size() if on else 1) if world is None else world
        if self.world > 1 and not on:
            raise BridgeError(f"{self.world} trainer ranks need torch.distributed: init_process_group first")
        self.options = o = options or Options()
        if not isinstance(model, TensorSource):
            model = TensorSource(model, rank=self.rank, filter=filter, rename=rename)
        elif filter or rename:
            raise BridgeError("a TensorSource has its own filter and rename; give them to it")
        self.source = model if adapter is None else model.adapter()
        self.engines = Engines()
        for engine in engines if isinstance(engines, list | tuple) else [engines]:
            self.engines.add(engine)
        lora = {} if adapter is None else {"adapter": adapter, "scaling": model.scaling()}
        told: list[Any] = [secrets.token_bytes(32), secrets.token_hex(8)]
        if self.world > 1:
            dist.broadcast_object_list(told)
        secret, run = told
        first = self._listen(secret)
        self._ranks = Ranks(self.rank, self.world, self._listener, first, secret)
        terms = {"secret": secret.hex(), "run": run, "seconds": o.seconds, "bucket_bytes": o.bucket_bytes}
        self._coordinator = Coordinator(self.engines, self._listener, o, terms | lora)
        self._sender = Sender(o.transport)
        self._links: set[str] = set()  # connections with engines that this rank knows of
        self._ways: dict[str, Way] = {}  # to workers, by "link/number"
        self._said: dict[str, tuple] | None = None  # signature of the source when its layout was told
        self._snapshot = Snapshot()
        self._planned: tuple[Any, dict[int, tuple[Bucket, ...]]] | None = None
        self._tried = 0  # updates that came as far as the vote: no two have one name
        self._sending: Future[Report] | None = None
        self._thread = ThreadPoolExecutor(1, "titan-send")
        """Of updates that nobody waits for; begins with the first of them."""

    def _listen(self, secret: bytes) -> tuple[str, int]:
        """Listen on every rank, or on none; where rank 0 listens."""
        mine: tuple[str, int] | Exception
        try:
            host, port = self.options.host or _own_address(self.engines), self.options.port
            self._listener = Listener(host, port and port + self.rank, secret)
            mine = (host, self._listener.port)
        except (BridgeError, TransferError) as error:
            mine = error
        heard: list[Any] = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(heard, mine)
        for rank, each in enumerate(heard):
            if isinstance(each, Exception):
                if not isinstance(mine, Exception):
                    self._listener.close()
                raise type(each)(f"trainer rank {rank}: " * (self.world > 1) + str(each)) from None
        return heard[0]

    # What users call

    def connect(self) -> None:
        """Meet the engines now instead of in the first update. Raises as `send`, too, where they do not fit."""
        self._call(self._meet)

    @overload
    def send(self, version: Version = ..., *, whole: bool = ..., wait: Literal[True] = ...) -> Report: ...
    @overload
    def send(self, version: Version = ..., *, whole: bool = ..., wait: Literal[False]) -> Sending: ...
    def send(self, version: Version = None, *, whole: bool = False, wait: bool = True) -> Report | Sending:
        """Bring the weights as they are now into all engines: what has changed where that is less, else all of it.

        Args:
            version: Name of these weights; else "1", "2", ...: a new number for each update that comes as far as the
                vote, taken or not.
            whole: Send all, whatever has changed.
            wait: Return when the engines serve them; else at once, with a handle. The tensors must not change, and a
                model under FSDP2 not run, before its `wait` has returned; other calls wait for it, too.

        Raises:
            TransferError: The reason. No engine has changed but those that it names; one of which no answer came in
                its commit may still take the update, and says what it serves in the next one.
            BridgeError: The source's tensors are not those of the first update.
        """
        started = time.monotonic()
        return self._call(lambda limit: self._send(version, whole, started, limit), wait)

    def verify(self) -> int:
        """Compare what the engines have, on every worker, with the weights as they are now, by fingerprints.

        Returns how many tensors were compared. TransferError names one that differs; the next update brings everything.
        """
        return self._call(self._verify)["compared"]

    def close(self) -> None:
        """Leave the engines to another trainer: a worker whose connection ends is free."""
        self._thread.shutdown()
        self._forget()
        self._ranks.close()
        self._listener.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    # The steps of one call; `protocol` has their order

    def _call(self, action: Callable[[Deadline], Any], wait: bool = True) -> Any:
        """A call of all ranks, after the one in the background, whose own `wait` says what became of that."""
        if self._sending is not None:
            self._sending.exception()
        self.source.reshard()  # in the thread that trains
        if wait:
            return self._run(action)
        self._sending = self._thread.submit(self._run, action)
        return Sending(self._sending)

    def _run(self, action: Callable[[Deadline], Any]) -> Any:
        self._ranks.begin()
        try:
            with torch.no_grad():
                return action(Deadline(self.options.seconds))
        except Exception as error:
            if not isinstance(error, BridgeError):
                self._forget()  # connections are made anew
            raise

    def _meet(self, limit: Deadline) -> dict[str, Any]:
        """Step 1: all ranks know the engines, and have their connections."""
        said: dict[str, tuple] | None = None

        def mine() -> dict[str, Any]:
            nonlocal said
            said = self.source.signature()
            if self._said is not None and said != self._said:
                raise BridgeError("the tensors are not those of the first update; make a new Trainer")
            dead = {way.link for way in self._ways.values() if not way.connection.alive()}
            return {
                "address": f"{self._listener.host}:{self._listener.port}",
                "layout": self.source.layout().to_json() if self._said is None else None,
                "links": list(self._links - dead),
                "base": self._snapshot.base,
            }

        answer = self._ranks.exchange(mine, self._coordinator.meet, limit, more=1)
        limit, self._said = limit.anew(), said
        self._leave(self._links - answer["engines"].keys())
        for link, engine in answer["engines"].items():
            if engine["sides"] is not None:
                self._join(link, Sides.from_json(engine["sides"]), limit)
        return answer

    def _join(self, link: str, sides: Sides, limit: Deadline) -> None:
        key = (sides, self.options.bucket_bytes)
        if self._planned is None or self._planned[0] != key:
            plan, most = self._coordinator.plan_of(sides), self.options.bucket_bytes
            out = messages(plan, sides.dtypes, sender=self.rank, bucket_bytes=most)
            self._planned = (key, {peer - sides.trainers: buckets for peer, buckets in out.items()})
        out = self._planned[1]
        found = self._listener.take(len(out), limit, role="data", link=link)
        for each in sorted(found, key=lambda each: each.hello["worker"]):
            at = each.hello["worker"]
            self._ways[f"{link}/{at}"] = Way(link=link, connection=each, buckets=out[at])
        self._links.add(link)

    def _send(self, version: Version, whole: bool, started: float, limit: Deadline) -> Report:
        met = self._meet(limit)
        local: Local = {}
        deltas: dict[str, Delta] = {}

        def changed() -> dict[str, Any]:
            nonlocal local, deltas
            local = self.source.local()
            if not whole and met["base"] is not None and met["base"] == self._snapshot.base:
                able = {
                    to: way.buckets for to, way in self._ways.items() if met["engines"][way.link]["delta"]
                }
                deltas = self._snapshot.deltas(local, able)
            return {"whole": [to for to in self._ways if to not in deltas], "base": met["base"]}

        going = self._ranks.exchange(changed, self._coordinator.prepare, limit.anew())["links"]
        limit, ways = limit.anew(), {to: way for to, way in self._ways.items() if way.link in going}
        sent = self._sender.send(ways, local, deltas, met["number"], limit)
        self._tried += 1
        mine = {
            "sent": sent,
            "kind": "whole" if ways.keys() - deltas.keys() else "delta",
            "version": str(self._tried if version is None else version),
        }
        told = self._ranks.exchange(lambda: mine, self._coordinator.commit, limit, more=2)
        base = told.pop("base")
        if self.options.delta:
            self._snapshot.take(local, [way.buckets for way in self._ways.values()], base)
        return Report(seconds=time.monotonic() - started, **told)

    def _verify(self, limit: Deadline) -> dict[str, Any]:
        self._meet(limit)

        def mine() -> dict[str, Any]:
            local, rank = self.source.local(), self.rank
            return {to: of_messages({rank: way.buckets}, local) for to, way in self._ways.items()}

        return self._ranks.exchange(mine, self._coordinator.verify, limit.anew())

    def _leave(self, links: set[str]) -> None:
        for to in [to for to, way in self._ways.items() if way.link in links]:
            self._ways.pop(to).close()
        self._links -= links

    def _forget(self) -> None:
        """Cut all connections with engines; what they have is not known."""
        self._leave(set(self._links))
        self._snapshot.base = None
        self._coordinator.close()


def _own_address(engines: Engines) -> str:
    """Of this host, as the first engine sees it."""
    host = next((getattr(engine.client, "address", None) for engine in engines.values()), None)
    if host is None:
        return "127.0.0.1"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise BridgeError(f"engine host {host} is not known here ({error}); give Options(host=...)") from None
