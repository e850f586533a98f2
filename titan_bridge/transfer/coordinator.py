"""What trainer rank 0 does for all ranks: it meets the engines, asks their workers, and commits. See `protocol`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.plan import Plan
from titan_bridge.transfer.engines import Engine, Engines
from titan_bridge.transfer.errors import PeerLost, TransferError
from titan_bridge.transfer.layouts import Sides, join_sides, views_from_json
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.protocol import Update, base_of, token_of
from titan_bridge.transfer.wire import Deadline, Listener, at_once

logger = logging.getLogger(__name__)

Given = Sequence[Mapping[str, Any]]
"""What all ranks said, by rank."""


class Coordinator:
    """Each method takes what all ranks said in a step, and returns the answer to all of them."""

    def __init__(
        self,
        engines: Engines,
        listener: Listener,
        options: Options,
        secret: str,
        run: str,
        adapter: Mapping[str, Any] | None = None,
    ) -> None:
        """`adapter`: of a LoRA trainer, what `Terms` say of it."""
        self._adapter = adapter or {}
        self.engines, self._listener, self._options = engines, listener, options
        self._secret, self._run = secret, run
        self._layouts: dict[int, Mapping[str, Any]] = {}
        self._plans: list[tuple[Sides, Plan]] = []
        """Made once and kept, also over connections; of two engines that are alike it is one."""
        self._number = 0
        self._dropped: dict[str, str] = {}

    # Steps 1 and 2: handshake and prepare

    def meet(self, given: Given, limit: Deadline) -> dict[str, Any]:
        """Connect with engines that are not connected, and ask all whether they are ready for an update.

        Raises:
            BridgeError: Two sides do not fit together, or what a rank found wrong.
            TransferError: An engine refused, or is lost and `on_dead` says "raise".
        """
        _raise_problems(given)
        self._started, self._dropped = time.monotonic(), {}
        if not len(self.engines):
            raise BridgeError("the trainer has no engine; give one, or trainer.engines.add(url)")
        self._layouts |= {rank: said["layout"] for rank, said in enumerate(given) if said["layout"]}
        terms = {
            "trainers": [said["address"] for said in given],
            "secret": self._secret,
            "run": self._run,
            "seconds": self._options.seconds,
            "bucket_bytes": self._options.bucket_bytes,
            **self._adapter,
        }
        known = set.intersection(*(set(said["links"]) for said in given))
        anew = [
            engine
            for engine in self.engines.all()
            if engine.link not in known or not all(worker.alive() for worker in engine.workers)
        ]
        self._settle(at_once(lambda engine: self._connect(engine, terms, limit), anew))
        base = None if given[0]["base"] is None else base_of(self._run, given[0]["base"])
        delta: dict[Engine, bool] = {}

        def check(engine: Engine) -> None:
            answers = engine.ask({"do": "check", "base": base}, limit)
            delta[engine] = all(answer["delta"] for answer in answers)

        self._settle(at_once(check, self.engines.all()))
        self._number += 1
        return {
            "number": self._number,
            "base": given[0]["base"],
            "engines": [
                {
                    "name": engine.name,
                    "link": engine.link,
                    "sides": engine.sides.to_json() if engine in anew and engine.sides else None,
                    "delta": delta[engine],
                }
                for engine in self.engines.all()
            ],
        }

    def _connect(self, engine: Engine, terms: Mapping[str, Any], limit: Deadline) -> None:
        engine.invite(terms, limit)
        link = engine.link
        engine.workers = self._listener.take(
            lambda hello: hello["role"] == "control" and hello["link"] == link, count=1, deadline=limit
        )
        told = engine.answers(limit)
        order = sorted(range(len(told)), key=lambda at: told[at]["index"])
        if (numbers := [told[at]["index"] for at in order]) != list(range(len(told))):
            raise TransferError(f"workers {numbers} of {engine.name} came; all of them have to, each once")
        engine.workers, told = [engine.workers[at] for at in order], [told[at] for at in order]
        sides = join_sides([self._layouts[rank] for rank in range(len(self._layouts))], told)
        if not set(sides.destination.params) <= set(sides.source.params):  # other names: by views
            engine.workers[0].send({"do": "views"}, limit)
            views = engine.workers[0].receive(limit)["views"]
            sides = dataclasses.replace(sides, views=views_from_json(views))
        engine.plan = self.plan_of(sides)
        if self._adapter and engine.plan.unused:
            raise BridgeError(
                f"{engine.name}: its adapter {self._adapter['adapter']!r} has nothing on {engine.plan.unused[0]}; "
                "load one into the engine that is on the layers that are trained"
            )
        engine.sides, engine.version = sides, told[0]["version"]
        data = sides.to_json()
        engine.ask(
            [{"do": "join", "sides": data, "at": sides.trainers + at} for at in range(len(told))], limit
        )
        if any(hello["open"] for hello in told):  # an earlier trainer died in its commit
            engine.end_session(limit)

    def plan_of(self, sides: Sides) -> Plan:
        found = next((plan for known, plan in self._plans if known == sides), None)
        if found is None:
            found = sides.plan()
            self._plans = [*self._plans[-3:], (sides, found)]
        return found

    def prepare(self, given: Given, limit: Deadline) -> dict[str, Any]:
        """Let every worker make room for what is coming, and begin to receive."""
        _raise_problems(given)
        number = self._number

        def one(engine: Engine) -> None:
            whole: list[list[int]] = [[] for _ in engine.workers]
            for rank, said in enumerate(given):
                for at, kind in said["kinds"][engine.link].items():
                    if kind == "whole":
                        whole[int(at)].append(rank)
            base = given[0]["base"]
            engine.ask([{"do": "prepare", "base": base, "whole": ranks} for ranks in whole], limit)
            engine.request({"do": "receive", "number": number}, limit)

        self._settle(at_once(one, self.engines.all()))
        self._phases = {"prepared": time.monotonic() - self._started}
        return {"links": [engine.link for engine in self.engines.all()]}

    # Steps 4 to 6: vote, commit, acknowledge

    def commit(self, given: Given, version: str, limit: Deadline) -> dict[str, Any]:
        """Hear what everybody says of sending and receiving; if that is "yes", let the engines take it.

        Raises:
            TransferError: The update did not happen, and why; what a worker said before what its peer noticed.
        """
        received: dict[str, int] = {}
        sent: list[dict[str, int]] = [{} for _ in given]

        def vote(engine: Engine) -> None:
            said = [
                (rank, f"{engine.name}/{at}", outcome)
                for rank, each in enumerate(given)
                for at, outcome in each["sent"].get(engine.link, {}).items()
            ]
            problem = next((f"trainer rank {rank}: {why}" for rank, _, why in said if type(why) is str), None)
            try:
                answers = engine.answers(limit)
            except PeerLost as error:
                raise PeerLost(problem or str(error)) from None
            if problem:
                raise TransferError(problem)
            received.update({f"{engine.name}/{at}": answer["bytes"] for at, answer in enumerate(answers)})
            for rank, worker, count in said:
                sent[rank][worker] = count

        self._settle(at_once(vote, self.engines.all()))
        self._phases["received"] = time.monotonic() - self._started
        before, pauses = {engine.name: engine.version for engine in self.engines.all()}, {}

        def take(engine: Engine) -> None:
            token = token_of(self._secret, engine.link, self._number, version)
            told = {"link": engine.link, "number": self._number, "version": version, "token": token}
            update = Update(**told, pause=self._options.pause)
            begun, failed = time.monotonic(), None
            try:
                engine.commit(update, limit)
            except TransferError as error:
                failed = error
            pauses[engine.name] = time.monotonic() - begun
            try:
                states = engine.ask({"do": "state"}, limit)
            except TransferError as error:
                raise failed or error from None
            if any(state["base"] != base_of(self._run, self._number) for state in states):
                raise failed or TransferError(f"{engine.name} did not take the update")
            engine.version = version

        self._settle(at_once(take, self.engines.all()))
        self._phases["live"] = time.monotonic() - self._started
        engines = self.engines.all()
        plans = [engine.plan for engine in engines if engine.plan is not None]
        there = {engine.name for engine in engines}
        return {
            "number": self._number,
            "version": version,
            "before": {name: was for name, was in before.items() if name in there},
            "kind": "whole" if any(said["kind"] == "whole" for said in given) else "delta",
            "sent": sent,
            "received": received,
            "lower_bound": sum(plan.lower_bound for plan in plans),
            "phases": self._phases,
            "pause": max(pauses.values()),
            "unused": sorted(set.intersection(*(set(plan.unused) for plan in plans))),
            "dropped": self._dropped,
        }

    def verify(self, given: Given, limit: Deadline) -> dict[str, Any]:
        """Compare the trainer's fingerprints with every worker's; answers with the names that differ, by worker."""
        _raise_problems(given)
        differ: dict[str, list[str]] = {}
        compared = 0
        for engine in self.engines.all():
            for at, answer in enumerate(engine.ask({"do": "fingerprints"}, limit)):
                ours: dict[str, int] = {}
                for said in given:
                    for name, value in said["fingerprints"].get(engine.link, {}).get(str(at), {}).items():
                        ours[name] = (ours.get(name, 0) + value) % 2**64
                compared += len(answer["fingerprints"])
                theirs = answer["fingerprints"]
                if names := sorted(name for name in theirs if ours.get(name, theirs[name]) != theirs[name]):
                    differ[f"{engine.name}/{at}"] = names
        return {"differ": differ, "compared": compared}

    def _settle(self, failed: Mapping[Engine, Exception]) -> None:
        """Raise what must be raised, and leave out engines that are lost if the options say so."""
        for error in failed.values():
            if not isinstance(error, PeerLost) or self._options.on_dead == "raise":
                raise error
        if failed and len(failed) == len(self.engines):
            raise next(iter(failed.values()))
        for engine, error in failed.items():
            logger.warning("weight transfer: %s is left out: %s", engine.name, error)
            self._dropped[engine.name] = str(error)
            self.engines.remove(engine.name)

    def close(self) -> None:
        """Cut all connections; the next update makes new ones."""
        for engine in self.engines.all():
            engine.close()


def _raise_problems(given: Given) -> None:
    if found := [said["problem"] for said in given if said.get("problem")]:
        raise BridgeError(found[0])
