"""Servers on several nodes watch each other, so that one that ends takes the others with it.

vLLM's workers on another node wait for the first node's next message for ever, and a first node that waits for a
collective waits for half an hour. So the process that the user started keeps one connection from each other node to
the first one. Both sides send a byte every few seconds: an end of file tells of a process that died, silence of a host
that did, and a last byte of one that was stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from titan_bridge.errors import BridgeError

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 25.0
"""How long a node may be silent; one that imports holds its threads up for some seconds."""

END_SECONDS = 20.0
"""How long vLLM may take to shut down after another node was lost, before its processes are killed."""

PATIENCE_SECONDS = 15.0
"""When a node says that it still waits for the first one."""

_HELLO = "titan-bridge node "
_BEAT, _BYE = b".", b"!"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """One node's place among several, from vLLM's options."""

    rank: int
    address: str
    """Of the first node, as the others reach it."""
    port: int
    """Where the first node listens for the others."""


def node(options: Mapping[str, Any], dp: int) -> Node | None:
    """This machine's place by vLLM's options (Python names); None where the engine has one machine.

    The port is the first free one after vLLM's own: `master_port` with `nnodes`, else `data_parallel_rpc_port`.
    """
    rpc = options.get("data_parallel_rpc_port", 29550)
    if options.get("nnodes", 1) > 1:
        rank, own = options.get("node_rank", 0), options.get("master_port", 29501)
        address = options.get("master_addr", "127.0.0.1")
    else:
        given = options.get("data_parallel_start_rank", options.get("data_parallel_rank"))
        if given is None and options.get("data_parallel_size_local", dp) == dp:
            return None
        rank, own, address = given or 0, rpc, options.get("data_parallel_address", "127.0.0.1")
    return Node(rank=rank, address=address, port=own + 1 if own + 1 != rpc else own + 2)


class Watch:
    """The connections of one node, from `watch`."""

    def __init__(self, own: Node) -> None:
        self.lost: str | None = None
        """What became of the node that was lost first, one line; None while all are there."""
        self.stopped = False
        """Whether that node was told to stop, and has not died."""
        self._own = own
        self._peers: dict[int, socket.socket] = {}
        self._ending = threading.Event()
        self._lock = threading.Lock()

    def listen(self) -> None:
        """On the first node: take connections from now on.

        Raises:
            BridgeError: the address is not this machine's, or the port is taken.
        """
        where = (self._own.address, self._own.port)
        try:
            server = socket.create_server(where)
        except OSError as error:
            raise BridgeError(
                f"port {where[1]} on {where[0]} cannot be used ({error.strerror}): nodes watch each other there, one "
                "port after --master-port or --data-parallel-rpc-port; give another, or the first node's own address"
            ) from None
        self._start(self._accept, server)

    def connect(self) -> None:
        """On another node: connect as soon as the first one listens."""
        self._start(self._join)

    def close(self, *, stopped: bool) -> None:
        """Watch no longer; the others learn whether this node was `stopped`, or else could not go on."""
        self._ending.set()
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    if stopped:
                        peer.sendall(_BYE)
                    peer.close()

    def _start(self, body: Any, *arguments: Any) -> None:
        for target, given in ((body, arguments), (self._beat, ())):
            threading.Thread(target=target, args=given, daemon=True, name="titan-bridge nodes").start()

    def _accept(self, server: socket.socket) -> None:
        with server:
            server.settimeout(BEAT_SECONDS)
            while not self._ending.is_set():
                with contextlib.suppress(OSError):
                    peer, (address, *_) = server.accept()
                    threading.Thread(target=self._greet, args=(peer, address), daemon=True).start()

    def _greet(self, peer: socket.socket, address: str) -> None:
        """Read which node it is; whoever says anything else is not one of ours."""
        peer.settimeout(SILENCE_SECONDS)
        with contextlib.suppress(OSError, ValueError):
            with peer.makefile("rb", buffering=0) as stream:
                hello = stream.readline(64).decode("ascii")
            rank = int(hello.removeprefix(_HELLO))
            if hello.startswith(_HELLO) and rank > 0 and rank not in self._peers:
                self._follow(rank, peer, address)
                return
        peer.close()

    def _join(self) -> None:
        where, patience = (self._own.address, self._own.port), time.monotonic() + PATIENCE_SECONDS
        while not self._ending.is_set():
            try:
                peer = socket.create_connection(where, timeout=SILENCE_SECONDS)
                peer.sendall(f"{_HELLO}{self._own.rank}\n".encode())
            except OSError as error:
                self._ending.wait(0.5)
                if time.monotonic() > patience:
                    patience = float("inf")
                    say(f"waiting for the first node: {where[0]} port {where[1]}: {error.strerror or error}")
                continue
            self._follow(0, peer, where[0])
            return

    def _beat(self) -> None:
        while not self._ending.wait(BEAT_SECONDS):
            with self._lock:
                for peer in self._peers.values():
                    with contextlib.suppress(OSError):
                        peer.sendall(_BEAT)

    def _follow(self, rank: int, peer: socket.socket, address: str) -> None:
        with self._lock:
            self._peers[rank] = peer
        how = "has ended"
        while not self._ending.is_set():
            try:
                got = peer.recv(64)
            except TimeoutError:
                how = f"was not heard of for {SILENCE_SECONDS:.0f} s"
            except OSError:
                pass
            else:
                if got and _BYE not in got:
                    continue
                self.stopped = bool(got)
                how = "was stopped" if got else how
            if not self._ending.is_set():
                self._lose(f"node {rank} ({address}) {how}; this server cannot go on without it and ends")
            return

    def _lose(self, line: str) -> None:
        self._ending.set()
        self.lost = line
        say(line)
        last = threading.Timer(END_SECONDS, kill_all)
        last.daemon = True
        last.start()
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def watch(own: Node | None) -> Iterator[Watch | None]:
    """Watch the other nodes meanwhile: once one is lost, this process gets SIGTERM, and has `END_SECONDS`."""
    if own is None:
        yield None
        return
    found = Watch(own)
    if own.rank == 0:
        found.listen()
    else:
        found.connect()
    failed = True
    try:
        yield found
        failed = False
    except (KeyboardInterrupt, SystemExit):
        failed = False
        raise
    finally:
        found.close(stopped=found.stopped if found.lost else not failed)


def say(line: str) -> None:
    """One line to the user."""
    sys.stderr.write(f"titan-bridge: {line}\n")
    sys.stderr.flush()


def kill_all() -> None:
    """End this process and all that it started, at once."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)
