"""Hugging Face configs and checkpoints as TorchTitan models: one file a family; `registry` finds them."""

from titan_bridge.models.family import Family, load_hf_config
from titan_bridge.models.fields import UnsupportedModelError
from titan_bridge.models.registry import families, family_for, family_of, register

__all__ = [
    "Family",
    "UnsupportedModelError",
    "families",
    "family_for",
    "family_of",
    "load_hf_config",
    "register",
]
