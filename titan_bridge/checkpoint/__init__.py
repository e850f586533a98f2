"""Checkpoints in files: read any of three formats box by box, and stream one into another.

- Hugging Face safetensors, one file or many with an index;
- DCP directories as TorchTitan writes them, model only or a full training checkpoint;
- engine files: the local shards of every rank of an inference layout, written here.
"""

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
