"""What went wrong with an update, said on every trainer rank."""

from __future__ import annotations


class TransferError(RuntimeError):
    """An update did not happen: the engine serves what it served before, and takes the next good update.

    A user's mistake (a tensor that is missing, two sides that do not fit) is a BridgeError instead.
    """


class PeerLost(TransferError):
    """Somebody did not answer within the time, or the connection with it is gone."""
