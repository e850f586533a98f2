"""Carry a model between TorchTitan (training) and vLLM (inference) with one description of its sharding."""

import os

# TorchTitan asks for GPUs when it is imported. Asked without NVML, that initialises CUDA, and no process can be forked
# from this one any more. vLLM sets the same, but may be imported later.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

__version__ = "0.1.0"
