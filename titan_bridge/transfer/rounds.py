"""One update, as rank 0 leads it and the other trainer ranks follow.

start_weight_update; update_weights, which keeps the workers busy receiving while all trainer ranks send; when every
worker has said that it has everything, the engine pauses and the decision is posted; finish_weight_update, and the
workers' word that the update is live; then the engine goes on. Since bytes wait in staging, requests are paused for
the last part only, and a trainer that dies while it sends leaves an engine that serves. For one that dies in the last
part, a few milliseconds, `HTTPClient` has a guard that resumes the engine; with another client it stays paused until
somebody resumes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from titan_bridge.transfer.control import MARGIN, Call, Control
from titan_bridge.transfer.dense import Deadline
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.link import Link
from titan_bridge.transfer.payload import Update

Transmit = Callable[[Deadline], None]
"""Sends this rank's share. Raises TransferError."""


def follow(link: Link, number: int, limit: Deadline, transmit: Transmit) -> dict[str, Any]:
    """A round on a rank other than 0; returns what `lead` does. Raises TransferError when the update did not happen."""
    problem: str | None = None
    go = link.board.read(link.note(number, "go"), seconds=limit.left + MARGIN)
    if go is None:
        try:
            transmit(limit)
        except TransferError as error:
            problem = str(error)
        link.board.post(link.note(number, f"sent/{link.rank}"), {"error": problem, "bytes": _sent(link)})
    done = link.board.read(link.note(number, "done"), seconds=limit.left + 4 * MARGIN)
    if "error" in done:
        raise TransferError(done["error"])
    return done


def _sent(link: Link) -> list[int]:
    """Bytes of this round to each worker."""
    return [link.transport.sent.get(worker, 0) for worker in link.workers]


def lead(
    link: Link, control: Control, number: int, limit: Deadline, transmit: Transmit, what: dict[str, Any]
) -> dict[str, Any]:
    """A round on rank 0; returns sent, received and phases of the report.

    Args:
        what: version, base and kind of the update.

    Raises:
        TransferError: Why the update did not happen, after the engine was told so if it can be reached.
    """
    started = time.monotonic()
    phases: dict[str, float] = {}
    told: dict[str, Any] = {"phases": phases}
    paused = False
    try:
        control.begin(limit)
        info = Update(
            host=link.terms.host,
            port=link.terms.port,
            trainer=link.terms.trainer,
            epoch=link.terms.epoch,
            round=number,
            first=link.sides.trainers,
            **what,
        )
        call = control.start(lambda: control.client.update_weights(asdict(info)))
        for worker in link.workers:
            if reason := control.hear(link.note(number, f"ready/{worker}"), call, limit):
                raise TransferError(reason)
        link.board.post(link.note(number, "go"), None)
        phases["ready"] = time.monotonic() - started
        told |= _transmit_and_hear(link, control, number, limit, transmit, call)
        phases["received"] = time.monotonic() - started
        call.result(limit.left + MARGIN)
        paused = control.pause(limit)
        link.board.post(link.note(number, "decision"), "take")
        control.finish(limit)
        for worker in link.workers:
            if reason := control.hear(link.note(number, f"applied/{worker}"), None, limit):
                raise TransferError(reason)
        phases["live"] = time.monotonic() - started
        control.settle(what["version"], limit)
    except Exception as error:
        told = {"error": str(error)}
        link.close()
        _give_up(link, control, number, str(error))
        raise error if isinstance(error, TransferError) else TransferError(str(error)) from error
    finally:
        if paused:
            control.resume()
        link.board.post(link.note(number, "done"), told)
    return told


def _transmit_and_hear(
    link: Link, control: Control, number: int, limit: Deadline, transmit: Transmit, call: Call
) -> dict[str, Any]:
    """Send, and wait until all workers have everything; returns the bytes that everybody sent and received."""
    received: list[int] = []
    own: str | None = None
    try:
        transmit(limit)
    except TransferError as error:
        own = str(error)  # a worker may know better why
    for worker in link.workers:
        index = worker - link.sides.trainers
        try:
            got = control.hear(link.note(number, f"got/{worker}"), call, limit)
        except TransferError as error:
            raise TransferError(own or str(error)) from None
        if "error" in got:
            raise TransferError(f"worker {index}: {got['error']}")
        received.append(got["bytes"])
    if own is not None:
        raise TransferError(own)
    sent = [_sent(link)]
    for rank in range(1, link.sides.trainers):
        said = control.hear(link.note(number, f"sent/{rank}"), call, limit)
        if said["error"] is not None:
            raise TransferError(f"trainer rank {rank}: {said['error']}")
        sent.append(said["bytes"])
    return {"sent": sent, "received": received}


def _give_up(link: Link, control: Control, number: int, problem: str) -> None:
    """End the session in the engine, if it can be reached; else the next connection does it."""
    for what in ("go", "decision"):  # a note is written once: where it went out already this changes nothing
        if not link.board.has(link.note(number, what)):
            link.board.post(link.note(number, what), problem)
    if control.open:
        control.finish_quietly(Deadline(MARGIN))
