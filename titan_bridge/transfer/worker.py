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
import hmac
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from titan_bridge.errors import BridgeError
from titan_bridge.transfer.errors import TransferError, described
from titan_bridge.transfer.fingerprints import of_messages
from titan_bridge.transfer.layouts import Sides
from titan_bridge.transfer.messages import messages
from titan_bridge.transfer.protocol import CONNECT_SECONDS, VERSION, Terms, Update, base_of, token_of
from titan_bridge.transfer.staging import Messages, Staged, Staging
from titan_bridge.transfer.target import Target, sample_digest, signature
from titan_bridge.transfer.transports import Tcp, accept
from titan_bridge.transfer.wire import Connection, Deadline, at_once, connect

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handlers, without importing it

UNKNOWN_VERSION = "default"
"""What vLLM, too, calls the weights that an engine was started with."""
QUESTIONS = ("views", "join", "check", "prepare", "receive", "state", "fingerprints")
"""What trainer rank 0 asks; each is a method of `Worker`."""
NICE = 10
"""How far the threads that receive stand behind the engine's on a busy core."""
BROKEN_VERSION = "broken"
"""After an update that a loader of vLLM's could not finish."""


@dataclasses.dataclass(kw_only=True)
class Link:
    """With one trainer, from `connect` until either side closes it."""

    terms: Terms
    control: Connection
    data: dict[int, Connection] = dataclasses.field(default_factory=dict)
    """By trainer rank, of those that send to this worker."""
    transports: dict[int, Tcp] = dataclasses.field(default_factory=dict)
    """Of those, once agreed on in the first update."""
    messages: Messages = dataclasses.field(default_factory=dict)
    staging: Staging | None = None
    expected: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    """Signatures of the live tensors that the plan was made for."""
    whole: frozenset[int] = frozenset()
    """Trainer ranks that send all of their messages in the update under way."""
    staged: tuple[int, list[Staged], Any] | None = None
    """Number of the update that has arrived, the update, and what the target has made of it ahead."""

    def close(self) -> None:
        for each in (self.control, *self.data.values(), *self.transports.values()):
            each.close()


class Worker:
    """One worker: `connect`, then for every update `begin`, `decide`, `finish`."""

    def __init__(self, target: Target, adapter: Callable[[str, float | None], Target] | None = None) -> None:
        """`adapter`: makes a target of a LoRA adapter's name and scaling; raises BridgeError where it cannot."""
        self.target = target
        self._adapter = adapter
        self._weights: Target | None = None
        """The target of the weights, while an adapter's is in its place."""
        self.version = UNKNOWN_VERSION
        """Of the weights that are live."""
        self.error: str | None = None
        """Why the last call did nothing, for logs and tests."""
        self._link: Link | None = None
        self._open = False
        """Between `begin` and `finish`."""
        self._decided: Update | None = None
        self._base: tuple[str, str] | None = None
        """Which update of which trainer is live, and a sample of the weights that it left."""
        self._planned: tuple[Any, Messages] | None = None
        self._writing = threading.Lock()

    # The engine's calls

    def connect(self, terms: Terms) -> None:
        """Meet a trainer; drops the one before if that is gone, and refuses the new one if not.

        Raises:
            TransferError: Why this worker is not connected with it.
        """
        self.error = None
        try:
            if terms.version != VERSION:
                raise TransferError(
                    f"the trainer speaks version {terms.version} of this protocol, the engine version {VERSION}"
                )
            now = self._link
            if now is not None and self.connected and now.terms.run != terms.run:
                raise TransferError(
                    f"the engine is connected with another trainer, at {now.terms.trainers[0]}; "
                    "shut that one down first"
                )
            self.shutdown()
            self._retarget(terms)
            control = self._reach(terms, 0, "control", Deadline(min(CONNECT_SECONDS, terms.seconds)))
        except (BridgeError, TransferError) as error:
            self._fail(str(error))
            raise
        link = self._link = Link(terms=terms, control=control)
        threading.Thread(target=self._serve, args=(link,), name="titan-transfer", daemon=True).start()

    def _retarget(self, terms: Terms) -> None:
        if self._weights is not None:
            self.target, self._weights = self._weights, None
            self._planned = self._base = None
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

    @property
    def staging_bytes(self) -> int:
        """Memory of the host that whole updates are staged in now."""
        return self._link.staging.nbytes if self._link and self._link.staging else 0

    def begin(self) -> None:
        """`start_weight_update`."""
        self._open, self._decided, self.error = True, None, None

    def decide(self, update: Update) -> None:
        """`update_weights`: the trainer has decided that an update which all workers have is to be taken.

        Raises:
            TransferError: Not connected with this trainer, or its token is wrong.
        """
        self.error, link = None, self._link
        if (
            link is None or link.terms.link != update.link
        ):  # not whether it is alive: workers may differ in that
            self._open = False
            self._fail(
                f"weight transfer not initialized: worker {self.target.index} is not connected with this trainer; "
                "call init_weight_transfer_engine first"
            )
            raise TransferError(self.error)
        want = token_of(link.terms.secret, update.link, update.number, update.version)
        if not hmac.compare_digest(want, update.token):
            self._open = False
            self._fail("update_info.token is wrong: this call does not come from the trainer")
            raise TransferError(self.error)
        self._decided = update

    def finish(self) -> None:
        """`finish_weight_update`: take the update on all workers that step together, or on none.

        Raises:
            TransferError: There was an update, and it was not taken.
        """
        update, self._decided, link = self._decided, None, self._link
        opened, self._open = self._open, False
        if update is None:
            return
        staged, staging = (link.staged, link.staging) if link is not None else (None, None)
        mine = opened and staged is not None and staged[0] == update.number and self._there()
        # The least of a number and of its negative: both are its own where all have the same.
        yes, least, most = self.target.agree([int(mine), update.number, -update.number])
        if not yes or least != -most:
            self._open = True  # as for vLLM
            self._fail(
                f"the update was not taken: {self.error or 'not all workers have it, or the trainer is gone'}"
            )
            raise TransferError(self.error)
        assert link is not None
        assert staging is not None
        assert staged is not None
        with self._writing:
            link.staged = None
            try:
                staging.write(*staged[1:])
            except Exception as error:
                # vLLM's loaders may raise anything, and the weights are then neither the old ones nor the new.
                self.version, self._base, self._open = BROKEN_VERSION, None, True
                self._fail(f"worker {self.target.index} has broken weights until the next update: {error!r}")
                raise TransferError(self.error) from error
            self.version = update.version
            self._base = (base_of(link.terms.run, update.number), sample_digest(self.target.tensors()))

    def _there(self) -> bool:
        """Whether trainer and target still are."""
        try:
            self.target.tensors()
        except BridgeError as error:
            self._fail(str(error))
            return False
        return self.connected

    def shutdown(self) -> None:
        """Leave the trainer; the weights stay."""
        if self._link is not None:
            self._link.close()
        self._link = None

    # What trainer rank 0 asks, answered in a thread while the engine steps

    def _serve(self, link: Link) -> None:
        limit = link.terms.seconds
        with contextlib.suppress(OSError):  # threads that this one starts are as it is
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            link.control.send(self._hello(), Deadline(limit))
            while True:
                asked = link.control.receive(None)
                try:
                    if asked["do"] not in QUESTIONS:
                        raise TransferError(
                            f"{asked['do']!r} is no question; there are {', '.join(QUESTIONS)}"
                        )
                    answer = getattr(self, f"_{asked['do']}")(link, asked, Deadline(limit))
                except Exception as error:
                    answer = {"error": described(error)}
                    self._fail(answer["error"], error)
                link.control.send(answer, Deadline(limit))
        except TransferError as error:
            logger.info("weight transfer: %s", error)
        except Exception:
            logger.exception("weight transfer")
        finally:
            link.close()
            link.staging = link.staged = None  # gives the memory back

    def _hello(self) -> dict[str, Any]:
        try:
            for name, tensor in self.target.tensors().items():
                if name in self.target.layout.params:
                    _fits(self.target, name, tensor)
        except TransferError as error:
            self._fail(str(error))
            return {"error": str(error)}
        return {
            "index": self.target.index,
            "rank": self.target.rank,
            "layout": self.target.layout.to_json(),
            "unpadded": {name: list(shape) for name, shape in self.target.unpadded.items()},
            "open": self._open,
            **self._state(),
        }

    def _views(self, link: Link, asked: Mapping[str, Any], limit: Deadline) -> dict[str, Any]:
        return {"views": [dataclasses.asdict(view) for view in self.target.views()]}

    def _join(self, link: Link, asked: Mapping[str, Any], limit: Deadline) -> dict[str, Any]:
        """Make the plan that the trainer makes, too, and a connection with each rank that sends something."""
        told = (asked["sides"], asked["at"], link.terms.bucket_bytes)
        if self._planned is None or self._planned[0] != told:
            sides = Sides.from_json(asked["sides"])
            for name in self.target.layout.params:
                mine = self.target.layout.local_shape(name, self.target.rank)
                if mine != sides.destination.local_shape(name, asked["at"]):
                    raise TransferError(f"the trainer's layout of {name} is not this worker's")
            dtypes = {name: param.dtype for name, param in sides.destination.params.items()}
            most = link.terms.bucket_bytes
            self._planned = (told, messages(sides.plan(), dtypes, receiver=asked["at"], bucket_bytes=most))
        live = self.target.tensors()
        link.messages = self._planned[1]
        link.staging = Staging(link.messages, self.target, live)
        link.expected = {name: signature(tensor) for name, tensor in live.items()}
        for rank in link.messages:
            link.data[rank] = self._reach(link.terms, rank, "data", limit)
        return {}

    def _check(self, link: Link, asked: Mapping[str, Any], limit: Deadline) -> dict[str, Any]:
        """Whether the plan still fits, and whether what is live is what the trainer's delta would be a delta of."""
        live = self.target.tensors()
        for name, expected in link.expected.items():
            if name not in live or signature(live[name]) != expected:
                now = signature(live[name]) if name in live else "gone"
                raise TransferError(
                    f"{name} on worker {self.target.index} is {now}; the plan was made for {expected}"
                )
        if self._base is not None and asked["base"] is not None and not self.target.whole:
            if self._base == (asked["base"], sample_digest(live)):
                return {"delta": True}
            self._base = None
        return {"delta": False}

    def _prepare(self, link: Link, asked: Mapping[str, Any], limit: Deadline) -> dict[str, Any]:
        whole = set(asked["whole"])
        if whole != link.messages.keys() and self._base is None:
            raise TransferError(
                f"a delta of {asked['base']}, but worker {self.target.index} has {self.version!r} of another origin"
            )
        assert link.staging is not None
        link.staged, link.whole = None, frozenset(whole)
        link.staging.prepare(whole)
        return {}

    def _receive(self, link: Link, asked: Mapping[str, Any], limit: Deadline) -> dict[str, Any]:
        number, staging = asked["number"], link.staging
        assert staging is not None
        staged: dict[int, Staged] = {}
        errors: list[Exception] = []

        def one(rank: int) -> None:
            try:
                if rank not in link.transports:
                    link.transports[rank] = accept(link.data[rank], staging.device, limit)
                way = link.transports[rank]
                staged[rank] = staging.receive(rank, way, number, rank in link.whole, limit)
            except Exception as error:
                errors.append(error)
                for each in link.data.values():
                    each.close()  # whatever else arrives belongs to nothing

        at_once(one, link.data)
        if errors:
            raise TransferError(f"worker {self.target.index}: {described(errors[0])}") from errors[0]
        link.staged = (number, list(staged.values()), staging.ahead())
        return {"bytes": sum(each.nbytes for each in staged.values())}

    def _state(self, *_: Any) -> dict[str, Any]:
        """What is live; waits for a commit that is under way."""
        with self._writing:
            return {
                "version": self.version,
                "base": self._base[0] if self._base else None,
                "error": self.error,
            }

    @torch.no_grad()
    def _fingerprints(self, link: Link, asked: Mapping[str, Any], limit: Deadline) -> dict[str, Any]:
        with self._writing:
            live = self.target.tensors()
            return {"fingerprints": of_messages(link.messages, live)}

    # Small things

    def _reach(self, terms: Terms, rank: int, role: str, limit: Deadline) -> Connection:
        index = self.target.index
        hello = {"role": role, "link": terms.link, "worker": index, "who": f"worker {index}"}
        host, _, port = terms.trainers[rank].rpartition(":")
        return connect(host, int(port), bytes.fromhex(terms.secret), hello, limit)

    def describe(self) -> dict[str, Any]:
        """What is live, and whether a trainer is there, in plain types."""
        return {**self._state(), "connected": self.connected}

    def _fail(self, text: str, error: Exception | None = None) -> None:
        self.error, cause = text, (error and error.__cause__) or error
        unknown = cause is not None and not isinstance(cause, BridgeError | TransferError)
        logger.error("weight transfer: %s", text, exc_info=cause if unknown else None)


def _fits(target: Target, name: str, tensor: torch.Tensor) -> None:
    want, dtype = target.layout.local_shape(name, target.rank), target.layout.params[name].dtype
    if tuple(tensor.shape) != want or f"torch.{dtype}" != str(tensor.dtype):
        raise TransferError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} here, its spec says {dtype} {want}"
        )
    if not tensor.is_contiguous():
        raise TransferError(f"{name} is not contiguous on worker {target.index}")
