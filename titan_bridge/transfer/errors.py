"""What went wrong with an update, said on every trainer rank."""

from __future__ import annotations


class TransferError(RuntimeError):
    """An update did not happen: the engine serves what it served before, and takes the next good update.

    A user's mistake (a tensor that is missing, an index outside a tensor) is a BridgeError instead.
    """
