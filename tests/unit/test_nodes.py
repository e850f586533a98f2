"""Which nodes watch each other where, and what one says of another that ends; real sockets, one process a node."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import time

import pytest

from titan_bridge.engine.run.nodes import Node, node, watch
from titan_bridge.errors import BridgeError
from titan_bridge.ports import free_port

MASTER = {"nnodes": 2, "master_addr": "10.0.0.1", "master_port": 29600}


@pytest.mark.parametrize(
    ("options", "dp", "expected"),
    [
        ({}, 4, None),
        ({"data_parallel_size_local": 4}, 4, None),
        ({**MASTER, "node_rank": 1}, 1, (1, "10.0.0.1", 29601)),
        ({**MASTER, "data_parallel_rpc_port": 29601}, 2, (0, "10.0.0.1", 29602)),
        ({"data_parallel_size_local": 1, "data_parallel_address": "h"}, 2, (0, "h", 29551)),
        (
            {"data_parallel_size_local": 2, "data_parallel_start_rank": 2, "data_parallel_rpc_port": 7000},
            4,
            (2, "127.0.0.1", 7001),
        ),
        ({"data_parallel_rank": 1}, 2, (1, "127.0.0.1", 29551)),
    ],
)
def test_a_nodes_place_is_in_vllms_options(options, dp, expected):
    found = node(options, dp)
    assert found == (expected and Node(rank=expected[0], address=expected[1], port=expected[2]))


SERVER = """
import signal, sys
from titan_bridge.engine.run.nodes import Node, watch

signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # as vLLM takes it
with watch(Node(rank=int(sys.argv[1]), address="127.0.0.1", port=int(sys.argv[2]))) as others:
    print("up", flush=True)
    try:
        if sys.stdin.readline() == "fail\\n":
            raise RuntimeError("failed")
    except SystemExit:
        if not others.lost:
            raise
sys.exit(1 if others.lost and not others.stopped else 0)
"""


@pytest.fixture
def nodes():
    """Three nodes that know of each other."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SERVER, str(rank), str(port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    for process in started:
        assert process.stdout.readline() == "up\n"
    time.sleep(1)  # until they are connected
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", ["kill", "fail", "stop"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_ends_ends_the_others(nodes, rank, how):
    if how == "kill":
        nodes[rank].kill()
    else:
        nodes[rank].stdin.write(f"{how}\n")
        nodes[rank].stdin.flush()
    for other in {0, 1, 2} - {rank}:
        assert nodes[other].wait(10) == (how != "stop")
        said = nodes[other].stderr.read().splitlines()[0]
        word = "was stopped" if how == "stop" else "has ended"
        # Only the first node hears of the others; node 2 hears of it alone.
        lost = rank if 0 in (rank, other) else 0
        assert said == (
            f"titan-bridge: node {lost} (127.0.0.1) {word}; this server cannot go on without it and ends"
        )


def test_a_stranger_is_not_taken_for_a_node(nodes):
    port = int(nodes[0].args[-1])
    for hello in (b"GET / HTTP/1.1\n", b"titan-bridge node 1\n", b"titan-bridge node -1\n", b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(hello)
    time.sleep(1)
    assert [process.poll() for process in nodes] == [None] * 3


def test_a_port_that_is_taken_is_named(busy_port):
    with (
        pytest.raises(BridgeError, match=f"port {busy_port} on 127.0.0.1 cannot be used"),
        watch(Node(rank=0, address="127.0.0.1", port=busy_port)),
    ):
        pass


def test_a_node_whose_first_word_is_cut_off_tries_again(monkeypatch):
    """As through a balancer that takes a connection before the first node listens."""
    connect, first = socket.create_connection, True

    def connect_late(*given, **options):
        nonlocal first
        peer = connect(*given, **options)
        if first:  # this end writes once the other one has hung up
            first = False
            taken, _ = server.accept()
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            taken.close()
            time.sleep(0.2)
        return peer

    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as held:
        server.settimeout(10)
        monkeypatch.setattr(socket, "create_connection", connect_late)
        with watch(Node(rank=3, address="127.0.0.1", port=server.getsockname()[1])) as others:
            deadline = time.monotonic() + 10
            while first and time.monotonic() < deadline:
                time.sleep(0.05)
            peer, _ = server.accept()
            held.enter_context(peer)  # this process would be told to end
            with peer.makefile("rb") as stream:
                assert stream.readline() == b"titan-bridge node 3\n"
            assert others.lost is None
