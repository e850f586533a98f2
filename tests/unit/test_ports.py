from __future__ import annotations

import socket
from pathlib import Path

from titan_bridge.ports import free_port


def test_ports_are_free_and_not_those_of_outgoing_connections():
    ports = [free_port() for _ in range(20)]
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert first < 12_000 or all(port < first for port in ports)
    assert len(set(ports)) > 15
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports[0]))
        listener.listen()
