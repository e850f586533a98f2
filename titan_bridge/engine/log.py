"""Loggers of the engine's modules."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger


def logger_of(module: str) -> Any:
    """For `__name__`: a logger under vLLM's, whose handlers and level it shares, with vLLM's own methods."""
    return init_logger(f"vllm.{module}")
