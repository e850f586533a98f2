"""The engine's side of a transfer on one worker, without vLLM; `protocol` has the whole of it.

A thread talks with trainer rank 0 and receives, while the engine steps. What the engine's own thread does is what vLLM
calls: `connect` (as short as two connections take), `begin`, `decide`, and `finish`, which alone writes live tensors.

Bytes wait in staging. An undo log would take as much memory, but steps between the calls would compute with half an
update; with staging, giving up is free. `decide` raises only for what is true of all workers alike: vLLM ends the
session of a worker that raises there, and the others would wait for it in the vote. What one worker alone knows is its
"no" in that vote. `finish` raises on all workers when the update was not taken, so that nobody gives the old weights a
new version; vLLM then leaves the session open, and a second `finish` ends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hmac
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from titan_bridge.errors import BridgeError
from titan_bridge.transfer.errors import PeerLost, TransferError, described
from titan_bridge.transfer.fingerprints import of_messages
from titan_bridge.transfer.layouts import VIEWS, Sides
from titan_bridge.transfer.messages import messages
from titan_bridge.transfer.protocol import CONNECT_SECONDS, VERSION, Terms, Update, base_of, token_of
from titan_bridge.transfer.staging import Entry, Messages, Staging
from titan_bridge.transfer.target import Target, sample_digest, signature
from titan_bridge.transfer.transports import Tcp, accept
from titan_bridge.transfer.wire import Connection, Deadline, at_once, connect

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handlers, without importing it
E = TypeVar("E", bound=Exception)

UNKNOWN_VERSION = "default"  # what vLLM, too, calls the weights that an engine was started with
QUESTIONS = ("hello", "views", "join", "check", "prepare", "receive", "state", "fingerprints")
"""What trainer rank 0 asks, the first one by connecting; each is a method of `Worker`."""
NICE = 10  # how far the threads that receive stand behind the engine's on a busy core
BROKEN_VERSION = "broken"  # after an update that a loader of vLLM's could not finish


@dataclasses.dataclass(kw_only=True)
class Link:
    """With one trainer, from `connect` until either side closes it."""

    terms: Terms
    control: Connection
    data: dict[int, Connection] = dataclasses.field(default_factory=dict)
    """By trainer rank, of those that send to this worker."""
    transports: dict[int, Tcp] = dataclasses.field(default_factory=dict)
    """Of those, once agreed on in the first update."""
    staging: Staging | None = None
    staged: tuple[int, Callable[[], None]] | None = None
    """Number of the update that has arrived, and what makes it live."""

    def close(self) -> None:
        for each in (self.control, *self.data.values(), *self.transports.values()):
            each.close()


class Worker:
    """One worker: `connect`, then for every update `begin`, `decide`, `finish`."""

    def __init__(self, target: Target, adapter: Callable[[str, float | None], Target] | None = None) -> None:
        """`adapter`: makes a target of a LoRA adapter's name and scaling; raises BridgeError where it cannot."""
        self.target, self._adapter = target, adapter
        self._weights: Target | None = None  # the target of the weights, while an adapter's is in its place
        self.version = UNKNOWN_VERSION  # of the weights that are live
        self.error: str | None = None  # why the last call did nothing, for logs and tests
        self._link: Link | None = None
        self._open = False  # between `begin` and `finish`
        self._decided: Update | None = None
        self._base: tuple[str, str] | None = None
        """Which update of which trainer is live, and a sample of the weights that it left."""
        self._planned: tuple[Any, Messages] | None = None
        self._writing = threading.Lock()

    # The engine's calls

    def connect(self, terms: Terms) -> None:
        """Meet a trainer, in the place of one that is gone. Raises BridgeError or TransferError where it cannot."""
        self.error, now = None, self._link
        try:
            if terms.version != VERSION:
                raise TransferError(f"the trainer's protocol is {terms.version}, the engine's is {VERSION}")
            if now is not None and self.connected and now.terms.run != terms.run:
                other = f"at {now.terms.trainers[0]}; shut that one down first"
                raise TransferError(f"the engine is connected with another trainer, {other}")
            self.shutdown()
            self._retarget(terms)
            control = self._reach(terms, 0, "control", Deadline(min(CONNECT_SECONDS, terms.seconds)))
        except (BridgeError, TransferError) as error:
            self._failed(error)
            raise
        link = self._link = Link(terms=terms, control=control)
        threading.Thread(target=self._serve, args=(link,), name="titan-transfer", daemon=True).start()

    def _retarget(self, terms: Terms) -> None:
        if self._weights is not None:
            self.target, self._weights, self._planned, self._base = self._weights, None, None, None
        if terms.adapter is None:
            return
        if self._adapter is None:
            raise BridgeError(f"adapter {terms.adapter!r}: this engine takes no LoRA adapters from a trainer")
        adapter = self._adapter(terms.adapter, terms.scaling)
        self.target, self._weights, self._planned, self._base = adapter, self.target, None, None

    @property
    def connected(self) -> bool:
        """Whether a trainer is there."""
        return self._link is not None and self._link.control.alive()

    def begin(self) -> None:
        """`start_weight_update`."""
        self._open, self._decided, self.error = True, None, None

    def decide(self, update: Update) -> None:
        """`update_weights`: the trainer has decided that an update which all workers have is to be taken.

        Raises TransferError where this worker is not connected with the trainer, or the token is wrong.
        """
        self.error, link = None, self._link
        if link is None or link.terms.link != update.link:  # alive or not: workers may differ in that
            at = f"worker {self.target.index} is not connected with this trainer"
            problem = f"weight transfer not initialized: {at}; call init_weight_transfer_engine first"
        else:
            want = token_of(link.terms.secret, update.link, update.number, update.version)
            if hmac.compare_digest(want, update.token):
                self._decided = update
                return
            problem = "update_info.token is wrong: this call does not come from the trainer"
        self._open = False
        raise self._failed(TransferError(problem))

    def finish(self) -> None:
        """`finish_weight_update`: take the update on all workers that step together, or on none.

        Raises TransferError where there was an update and it was not taken.
        """
        update, self._decided, link = self._decided, None, self._link
        opened, self._open = self._open, False
        if update is None:
            return
        staged = link.staged if link is not None else None
        try:
            self._check_base(link)
            there = self.connected
        except Exception as error:  # whatever it is: the others wait in the vote
            self._failed(error)
            there = False
        mine = opened and staged is not None and staged[0] == update.number and there
        # The least of a number and of its negative: both are its own where all have the same.
        yes, least, most = self.target.agree([int(mine), update.number, -update.number])
        if not yes or least != -most:
            self._open = True  # as for vLLM
            why = self.error or "not all workers have it, or the trainer is gone"
            raise self._failed(TransferError(f"the update was not taken: {why}"))
        assert link is not None
        assert staged is not None
        with self._writing:
            link.staged = None
            try:
                staged[1]()
            except Exception as error:
                # vLLM's loaders may raise anything, and the weights are then neither the old ones nor the new.
                self.version, self._base, self._open = BROKEN_VERSION, None, True
                text = f"worker {self.target.index} has broken weights until the next update: {error!r}"
                raise self._failed(TransferError(text)) from error
            self.version = update.version
            self._base = (base_of(link.terms.run, update.number), sample_digest(self.target.tensors()))

    def _check_base(self, link: Link | None) -> None:
        """Raise TransferError where a delta has arrived and what is live is not what it is a delta of."""
        live, staging = self.target.tensors(), link.staging if link is not None else None
        delta = staging is not None and staging.whole != staging.messages.keys()
        if delta and (self._base is None or self._base[1] != sample_digest(live)):
            raise TransferError(f"worker {self.target.index} got other weights while a delta was on its way")

    def forget(self) -> None:
        """Other weights are about to be loaded: no delta goes on top of them."""
        self._base = None

    def shutdown(self) -> None:
        """Leave the trainer; the weights stay."""
        if self._link is not None:
            self._link.close()
        self._link = None

    # What trainer rank 0 asks, answered in a thread while the engine steps

    def _serve(self, link: Link) -> None:
        limit, asked = link.terms.seconds, {"do": "hello"}
        with contextlib.suppress(OSError):  # threads that this one starts are as it is
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            while True:
                try:
                    if asked["do"] not in QUESTIONS:
                        raise TransferError(f"{asked['do']!r} is none of {', '.join(QUESTIONS)}")
                    answer = getattr(self, f"_{asked['do']}")(link, asked, Deadline(limit))
                except Exception as error:
                    answer = {"error": described(self._failed(error))}
                link.control.send(answer, Deadline(limit))
                asked = link.control.receive(None)
        except TransferError as error:
            logger.info("weight transfer: %s", error)
        except Exception:
            logger.exception("weight transfer")
        finally:
            link.close()
            link.staging = link.staged = None  # gives the memory back

    def _hello(self, *_: Any) -> dict[str, Any]:
        target = self.target
        for name, tensor in target.tensors().items():
            if name not in target.layout.params:
                continue
            want = (f"torch.{target.layout.params[name].dtype}", target.layout.local_shape(name, target.rank))
            if (have := (str(tensor.dtype), tuple(tensor.shape))) != want:
                raise TransferError(f"{name} is {have} here, its spec says {want}")
            if not tensor.is_contiguous():
                raise TransferError(f"{name} is not contiguous on worker {target.index}")
        return {
            "index": target.index,
            "rank": target.rank,
            "layout": target.layout.to_json(),
            "unpadded": dict(target.unpadded),
            "open": self._open,
            **self._state(),
        }

    def _views(self, *_: Any) -> dict[str, Any]:
        return {"views": VIEWS.dump_python(tuple(self.target.views()))}

    def _join(self, link: Link, asked: Mapping[str, Any], limit: Deadline) -> dict[str, Any]:
        """Make the plan that the trainer makes, too, and a connection with each rank that sends something."""
        at, most = asked["at"], link.terms.bucket_bytes
        told = (asked["sides"], at, most)
        if self._planned is None or self._planned[0] != told:
            sides = Sides.from_json(asked["sides"])
            for name in self.target.layout.params:
                mine = self.target.layout.local_shape(name, self.target.rank)
                if mine != sides.destination.local_shape(name, at):
                    raise TransferError(f"the trainer's layout of {name} is not this worker's")
            self._planned = (told, messages(sides.plan(), sides.dtypes, receiver=at, bucket_bytes=most))
        link.staging = Staging(self._planned[1], self.target, self.target.tensors())
        for rank in link.staging.messages:
            link.data[rank] = self._reach(link.terms, rank, "data", limit)
        return {}

    def _check(self, link: Link, asked: Mapping[str, Any], limit: Deadline) -> dict[str, Any]:
        """Whether the plan still fits, and whether what is live is what the trainer's delta would be a delta of."""
        live = self.target.tensors()
        for name, expected in (link.staging.expected if link.staging else {}).items():
            now = signature(live[name]) if name in live else "gone"
            if now != expected:
                raise TransferError(f"{name} on worker {self.target.index} is {now}, planned was {expected}")
        if self._base is not None and asked["base"] is not None and not self.target.whole:
            if self._base == (asked["base"], sample_digest(live)):
                return {"delta": True}
            self._base = None
        return {"delta": False}

    def _prepare(self, link: Link, asked: Mapping[str, Any], limit: Deadline) -> dict[str, Any]:
        assert link.staging is not None
        link.staged, whole = None, asked["whole"]
        if set(whole) != link.staging.messages.keys() and self._base is None:
            raise TransferError(f"a delta of {asked['base']}, which worker {self.target.index} does not have")
        link.staging.prepare(whole)
        return {}

    def _receive(self, link: Link, asked: Mapping[str, Any], limit: Deadline) -> dict[str, Any]:
        number, staging = asked["number"], link.staging
        assert staging is not None
        came: dict[int, tuple[list[Entry], int]] = {}

        def one(rank: int) -> None:
            try:
                if rank not in link.transports:
                    link.transports[rank] = accept(link.data[rank], staging.device, limit)
                came[rank] = staging.receive(rank, link.transports[rank], number, limit)
            except Exception:
                for each in link.data.values():
                    each.close()  # whatever else arrives belongs to nothing
                raise

        failed = sorted(at_once(one, link.data).values(), key=lambda error: isinstance(error, PeerLost))
        if failed:  # the reason first: that others' connections were then closed is none
            raise TransferError(f"worker {self.target.index}: {described(failed[0])}") from failed[0]
        entries = [entry for found, _ in came.values() for entry in found]
        link.staged = (number, functools.partial(staging.write, entries, staging.ahead(entries)))
        return {"bytes": sum(nbytes for _, nbytes in came.values())}

    def _state(self, *_: Any) -> dict[str, Any]:
        """What is live; waits for a commit that is under way."""
        with self._writing:
            base = self._base and self._base[0]
            return {"version": self.version, "base": base, "error": self.error}

    @torch.no_grad()
    def _fingerprints(self, link: Link, *_: Any) -> dict[str, Any]:
        assert link.staging is not None
        with self._writing:
            return {"fingerprints": of_messages(link.staging.messages, self.target.tensors())}

    def _reach(self, terms: Terms, rank: int, role: str, limit: Deadline) -> Connection:
        index = self.target.index
        hello = {"role": role, "link": terms.link, "worker": index, "who": f"worker {index}"}
        host, _, port = terms.trainers[rank].rpartition(":")
        return connect(host, int(port), bytes.fromhex(terms.secret), hello, limit)

    def _failed(self, error: E) -> E:
        """Note and log it, with a traceback if nobody has expected it."""
        self.error, cause = described(error), error.__cause__ or error
        known = isinstance(cause, BridgeError | TransferError)
        logger.error("weight transfer: %s", self.error, exc_info=None if known else cause)
        return error
