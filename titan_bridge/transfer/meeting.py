"""How trainer rank 0 brings the trainer ranks and the workers of all engines together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from titan_bridge.errors import BridgeError
from titan_bridge.transfer.board import Board
from titan_bridge.transfer.control import MARGIN, Call, Control
from titan_bridge.transfer.dense import Deadline
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.exchange import Sides, WorkerId, join_sides, names_differ
from titan_bridge.transfer.link import Link
from titan_bridge.transfer.payload import Terms


def invite(
    board: Board, control: Control, terms: Terms, check: Callable[[Sides], Any], limit: Deadline
) -> tuple[Call, bool]:
    """Ask the workers in, put both layouts together and post them, or post why not.

    Args:
        check: Raises BridgeError for sides that do not fit together.

    Returns:
        The call that keeps the workers busy, and whether an update that an earlier trainer began is still open.

    Raises:
        BridgeError: The two sides do not fit together.
        TransferError: A worker refused, or somebody did not come within the time.
    """
    call = control.start(lambda: control.client.init_weight_transfer_engine(asdict(terms)))
    try:
        ranks = range(terms.trainers)
        trainers = [board.read(f"{terms.prefix}/trainer/{rank}", seconds=limit.left) for rank in ranks]
        workers = _hellos(control, terms, call, limit)
        if refused := [note["refused"] for note in trainers if "refused" in note]:
            raise BridgeError(refused[0])
        joined = join_sides(trainers, workers)
        views = names_differ(joined.source, joined.destination)
        board.post(f"{terms.prefix}/ask", "views" if views else "nothing")
        data = joined.to_json()
        if views:
            data["views"] = control.hear(f"{terms.prefix}/views", call, limit)
            joined = Sides.from_json(data)
        check(joined)
        board.post(f"{terms.prefix}/sides", data)
        return call, any(hello["open"] for hello in workers.values())
    except (TransferError, BridgeError) as error:
        board.post(f"{terms.prefix}/ask", "nothing")
        board.post(
            f"{terms.prefix}/sides", {"refused": str(error), "mistake": isinstance(error, BridgeError)}
        )
        raise


def _hellos(control: Control, terms: Terms, call: Call, limit: Deadline) -> dict[WorkerId, Mapping[str, Any]]:
    workers: dict[WorkerId, Mapping[str, Any]] = {}
    for engine in range(terms.engines):
        index, count = 0, 1
        while index < count:
            hello = control.hear(terms.hello(engine, index), call, limit)
            if "refused" in hello:
                raise TransferError(hello["refused"])
            workers[engine, index], count = hello, hello["count"]
            index += 1
    return workers


def welcome(link: Link, control: Control, call: Call, open_session: bool, limit: Deadline) -> str | None:
    """Wait until all workers are in, and close the session of an earlier trainer; the reason if one is not in."""
    try:
        for engine, index in link.sides.workers:
            problem = control.hear(f"{link.terms.prefix}/joined/{engine}.{index}", call, limit)
            if problem is not None:
                return problem
        call.result(limit.left + MARGIN)
        if open_session:
            control.finish_quietly(Deadline(limit.left))
    except TransferError as error:
        return str(error)
    return None
