"""Checkpoints in files: Hugging Face safetensors and DCP, read box by box, and one streamed into the other."""

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
