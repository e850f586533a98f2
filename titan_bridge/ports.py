"""A port to listen on."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST = 10_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now.

    Not one of those that the system gives to outgoing connections, where it can be told: of these, one may be taken
    between this answer and the moment somebody listens.
    """
    end = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 0
    for _ in range(100 if end > _LOWEST + 1_000 else 0):
        port = random.SystemRandom().randrange(_LOWEST, end)  # a seeded program asks for different ones, too
        if _is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
