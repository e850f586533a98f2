"""The notice board of a transfer: small JSON notes between trainer ranks and engine workers, beside the data.

It lives in trainer rank 0 (torch's TCPStore), so it dies with the trainer, and everybody who reads from it then
notices at once. Every read has a time limit.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from titan_bridge.transfer.errors import TransferError

_ALIVE = "alive"


class Board:
    """Notes by key; a note is written once and read by anybody."""

    def __init__(self, store: dist.TCPStore) -> None:
        self._store = store

    @classmethod
    def open(cls, host: str, port: int, *, seconds: float) -> Board:
        """Make the board, on trainer rank 0; port 0 takes a free one."""
        with _explained(f"cannot open a store at {host}:{port}"):
            board = cls(
                dist.TCPStore(host, port, None, True, timedelta(seconds=seconds), wait_for_workers=False)
            )
        board.post(_ALIVE, True)
        return board

    @classmethod
    def join(cls, host: str, port: int, *, seconds: float) -> Board:
        """Join the board of a trainer. Raises TransferError when there is none within the time."""
        with _explained(f"no trainer at {host}:{port}"):
            return cls(
                dist.TCPStore(host, port, None, False, timedelta(seconds=seconds), wait_for_workers=False)
            )

    @property
    def port(self) -> int:
        return self._store.port

    def post(self, key: str, value: Any) -> None:
        """Write a note (anything JSON can say)."""
        with _explained(f"cannot post {key}"):
            self._store.set(key, json.dumps(value))

    def read(self, key: str, *, seconds: float) -> Any:
        """The note under `key`, once it is there. Raises TransferError after the time, or when the board is gone."""
        with _explained(f"waited for {key}"):
            self._store.wait([key], timedelta(seconds=max(seconds, 0.001)))
            return json.loads(self._store.get(key))

    def has(self, key: str) -> bool:
        """Whether the note is there."""
        with _explained(f"cannot look for {key}"):
            return self._store.check([key])

    def alive(self, *, seconds: float = 2.0) -> bool:
        """Whether whoever opened the board still answers."""
        try:
            return self.read(_ALIVE, seconds=seconds)
        except TransferError:
            return False

    def store(self, prefix: str) -> dist.Store:
        """For the rendezvous of a process group."""
        return dist.PrefixStore(prefix, self._store)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except dist.DistStoreError as error:
        raise TransferError(f"{what}: no answer within the time limit ({_first(error)})") from None
    except (dist.DistError, RuntimeError) as error:
        raise TransferError(f"{what}: the connection is gone ({_first(error)})") from None


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
