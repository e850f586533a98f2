"""Carry a model between TorchTitan (training) and vLLM (inference) with one description of its sharding."""

__version__ = "0.1.0"
