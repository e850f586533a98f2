"""Live weight transfer from a trainer to engines: what changed or everything, each byte once, all or nothing."""

from titan_bridge.transfer.clients import HTTPClient, LLMClient
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.options import Options, Report
from titan_bridge.transfer.source import TensorSource
from titan_bridge.transfer.trainer import Sending, Trainer

__all__ = [
    "HTTPClient", "LLMClient", "Options", "Report", "Sending", "TensorSource", "Trainer", "TransferError",
]  # fmt: skip
