"""What trainer rank 0 does for all ranks: it meets the engines, asks their workers, and commits. See `protocol`."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.plan import Plan
from titan_bridge.transfer.engines import Engine, Engines
from titan_bridge.transfer.errors import PeerLost, TransferError
from titan_bridge.transfer.layouts import VIEWS, Sides, join_sides
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.protocol import Terms, Update, base_of, token_of
from titan_bridge.transfer.wire import Deadline, Listener, at_once

logger = logging.getLogger(__name__)

Given = Sequence[Mapping[str, Any]]  # what all ranks said, by rank


class Coordinator:
    """Each method takes what all ranks said in a step, and returns the answer to all of them.

    Raises BridgeError where two sides do not fit together, TransferError for what an engine refused, PeerLost where one
    is lost and `on_dead` says "raise".
    """

    def __init__(self, engines: Engines, listener: Listener, options: Options, terms: dict[str, Any]) -> None:
        """`terms`: those of `Terms` that are the same for all engines."""
        self.engines, self._listener, self._options, self._terms = engines, listener, options, terms
        self._layouts: dict[int, Mapping[str, Any]] = {}
        self._plans: list[tuple[Sides, Plan]] = []
        """Made once and kept, also over connections; of two engines that are alike it is one."""
        self._number = 0

    # Steps 1 and 2: handshake and prepare

    def meet(self, given: Given, limit: Deadline) -> dict[str, Any]:
        """Connect with engines that are not connected, and ask all whether they are ready for an update."""
        self._started, self._dropped = time.monotonic(), dict[str, str]()
        if not self.engines:
            raise BridgeError("the trainer has no engine; give one, or trainer.engines.add(url)")
        self._layouts |= {rank: said["layout"] for rank, said in enumerate(given) if said["layout"]}
        known = set.intersection(*(set(said["links"]) for said in given))
        anew = [
            engine
            for engine in self.engines.values()
            if engine.link not in known or not all(worker.alive() for worker in engine.workers)
        ]
        addresses, base = [said["address"] for said in given], given[0]["base"]
        self._settle(at_once(lambda engine: self._connect(engine, addresses, limit), anew))
        limit = limit.anew()

        def check(engine: Engine) -> None:
            engine.delta = all(answer["delta"] for answer in engine.ask({"do": "check", "base": base}, limit))

        self._settle(at_once(check, self.engines.values()))
        self._number += 1
        engines = {}
        for engine in self.engines.values():
            sides = engine.sides.to_json() if engine in anew else None
            engines[engine.link] = {"sides": sides, "delta": engine.delta}
        return {"number": self._number, "base": base, "engines": engines}

    def _connect(self, engine: Engine, addresses: list[str], limit: Deadline) -> None:
        engine.invite(Terms(trainers=addresses, link=secrets.token_hex(8), **self._terms), limit)
        engine.workers = self._listener.take(1, limit, role="control", link=engine.link)
        told = engine.answers(limit)
        order = sorted(range(len(told)), key=lambda at: told[at]["index"])
        engine.workers, told = [engine.workers[at] for at in order], [told[at] for at in order]
        if (numbers := [each["index"] for each in told]) != list(range(len(told))):
            raise TransferError(f"workers {numbers} of {engine.name} came; all of them have to, each once")
        sides = join_sides([self._layouts[rank] for rank in range(len(addresses))], told)
        if not set(sides.destination.params) <= set(sides.source.params):  # other names: by views
            engine.workers[0].send({"do": "views"}, limit)
            (answer,) = engine.answers(limit, of=1)
            sides = dataclasses.replace(sides, views=VIEWS.validate_python(answer["views"]))
        engine.sides, engine.plan, engine.version = sides, self.plan_of(sides), told[0]["version"]
        if "adapter" in self._terms and engine.plan.unused:
            lacks = f"{self._terms['adapter']!r} has nothing on {engine.plan.unused[0]}"
            raise BridgeError(f"{engine.name}: its adapter {lacks}; load one on the layers that are trained")
        ranks = range(sides.trainers, sides.trainers + len(told))
        engine.ask({"do": "join", "sides": sides.to_json()}, limit, at=ranks)
        if any(each["open"] for each in told):  # an earlier trainer died in its commit
            engine.end_session(limit)

    def plan_of(self, sides: Sides) -> Plan:
        found = next((plan for known, plan in self._plans if known == sides), None)
        if found is None:
            found = sides.plan()
            self._plans = [*self._plans[-3:], (sides, found)]
        return found

    def prepare(self, given: Given, limit: Deadline) -> dict[str, Any]:
        """Let every worker make room for what is coming, and begin to receive."""

        def one(engine: Engine) -> None:
            whole = [[r for r, said in enumerate(given) if key in said["whole"]] for key in engine.keys]
            engine.ask({"do": "prepare", "base": given[0]["base"]}, limit, whole=whole)
            engine.tell({"do": "receive", "number": self._number}, limit)

        self._settle(at_once(one, self.engines.values()))
        self._phases = {"prepared": time.monotonic() - self._started}
        return {"links": [engine.link for engine in self.engines.values()]}

    # Steps 4 to 6: vote, commit, acknowledge

    def commit(self, given: Given, limit: Deadline) -> dict[str, Any]:
        """Hear what everybody says of sending and receiving; if that is "yes", let the engines take it.

        What is raised when some have taken it names them.
        """
        version, base = given[0]["version"], base_of(self._terms["run"], self._number)
        received: dict[str, int] = {}

        def vote(engine: Engine) -> None:
            said = [(rank, each["sent"].get(key)) for rank, each in enumerate(given) for key in engine.keys]
            problem = next((f"trainer rank {rank}: {why}" for rank, why in said if type(why) is str), None)
            try:
                answers = engine.answers(limit)
            except PeerLost as error:
                raise PeerLost(problem or str(error)) from None
            if problem:
                raise TransferError(problem)
            received.update({key: answer["bytes"] for key, answer in zip(engine.keys, answers, strict=True)})

        self._settle(at_once(vote, self.engines.values()))
        self._phases["received"] = time.monotonic() - self._started
        before, pauses = {engine: engine.version for engine in self.engines.values()}, {}
        taken: list[str] = []

        def take(engine: Engine) -> None:
            told = {"link": engine.link, "number": self._number, "version": version}
            update = Update(**told, pause=self._options.pause, token=token_of(self._terms["secret"], **told))
            begun, failed = time.monotonic(), None
            try:
                engine.commit(update, limit.anew())
            except TransferError as error:
                failed = error
            pauses[engine] = time.monotonic() - begun
            try:
                states = engine.ask({"do": "state"}, limit.anew())
            except TransferError as error:
                raise failed or error from None
            if any(state["base"] != base for state in states):
                raise failed or TransferError(f"{engine.name} did not take the update")
            engine.version = version
            taken.append(engine.name)

        failed = at_once(take, self.engines.values())
        try:
            self._settle(failed)
        except TransferError as error:
            if not taken:
                raise
            there = f"{version!r} is live on {', '.join(sorted(taken))} all the same"
            raise type(error)(f"{error}; {there}") from None
        self._phases["live"] = time.monotonic() - self._started
        engines = list(self.engines.values())
        names = {key: f"{engine.name}/{at}" for engine in engines for at, key in enumerate(engine.keys)}
        return {
            "base": base,
            "version": version,
            "before": {engine.name: before[engine] for engine in engines},
            "kind": "whole" if any(said["kind"] == "whole" for said in given) else "delta",
            "sent": [{names[key]: n for key, n in said["sent"].items() if key in names} for said in given],
            "received": {names[key]: n for key, n in received.items() if key in names},
            "lower_bound": sum(engine.plan.lower_bound for engine in engines),
            "phases": self._phases,
            "pause": max(pauses.values()),
            "unused": sorted(set.intersection(*(set(engine.plan.unused) for engine in engines))),
            "dropped": self._dropped,
        }

    def verify(self, given: Given, limit: Deadline) -> dict[str, Any]:
        """Compare the trainer's fingerprints with every worker's. Raises TransferError for the first that differs."""
        compared, differ = 0, []
        for engine in self.engines.values():
            answers = engine.ask({"do": "fingerprints"}, limit)
            for at, (key, answer) in enumerate(zip(engine.keys, answers, strict=True)):
                ours, theirs = Counter[str](), answer["fingerprints"]
                for said in given:
                    ours.update(said.get(key, {}))
                off = {name for name in theirs if name in ours and (theirs[name] - ours[name]) % 2**64}
                compared += len(theirs)
                differ += [f"{name} on {engine.name}/{at}" for name in sorted(off)]
        if differ:
            more = len(differ) - 1
            raise TransferError(f"{differ[0]} is not what the trainer has ({more} more such tensors)")
        return {"compared": compared}

    def _settle(self, failed: Mapping[Engine, Exception]) -> None:
        """Raise what must be raised, and leave out engines that are lost if the options say so."""
        every = self._options.on_dead == "raise" or len(failed) == len(self.engines)
        for error in failed.values():
            if every or not isinstance(error, PeerLost):
                raise error
        for engine, error in failed.items():
            logger.warning("weight transfer: %s is left out: %s", engine.name, error)
            self._dropped[engine.name] = str(error)
            self.engines.remove(engine.name)

    def close(self) -> None:
        """Cut all connections; the next update makes new ones."""
        for engine in self.engines.values():
            engine.close()
