"""What went wrong with an update, said on every trainer rank."""

from __future__ import annotations

from titan_bridge.errors import BridgeError


class TransferError(RuntimeError):
    """An update did not happen: every engine that the error does not name as one that has taken it serves what it
    served before, and all take the next good update.

    A user's mistake (a tensor that is missing, two sides that do not fit) is a BridgeError instead.
    """


class PeerLost(TransferError):
    """Somebody did not answer within the time, or the connection with it is gone."""


def described(error: Exception) -> str:
    """What others are told of an error, whatever it is: they must hear of it now and not wait."""
    known = isinstance(error, BridgeError | TransferError)
    return str(error) if known else f"{type(error).__name__}: {error}"
