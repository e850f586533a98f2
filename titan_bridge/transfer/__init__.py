"""Live weight transfer from a trainer to an engine: dense and sparse, each byte once, all or nothing."""

from titan_bridge.transfer.changes import Snapshot, changed
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.fanout import FanOutClient
from titan_bridge.transfer.http import HTTPClient
from titan_bridge.transfer.options import Options, Report
from titan_bridge.transfer.source import TensorSource
from titan_bridge.transfer.sparse import Patch
from titan_bridge.transfer.trainer import Trainer

__all__ = [
    "FanOutClient",
    "HTTPClient",
    "Options",
    "Patch",
    "Report",
    "Snapshot",
    "TensorSource",
    "Trainer",
    "TransferError",
    "changed",
]
