"""Authenticated TCP connections that carry short JSON messages and raw bytes.

Who connects and who listens both prove that they know the run's secret before anything else is read: the listener
sends a nonce, the other side answers with its hello, a nonce of its own and an HMAC over both, and gets an HMAC back.
Until then at most `HELLO_BYTES` are read within `HELLO_SECONDS`, and of more than `GREETINGS` such connections the
oldest is closed, so that a port scanner costs nothing. Nothing that arrives is ever unpickled: messages are JSON
objects of a bounded size, tensors are bytes whose number is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from titan_bridge.transfer.errors import PeerLost, TransferError

NONCE = MAC = 32
HELLO_BYTES = 4096
HELLO_SECONDS = 5.0
GREETINGS = 256
"""Most connections that have not proved anything yet: what a stranger may take of this process's open files."""
MESSAGE_BYTES = 256 * 2**20
"""Most bytes of one JSON message: both layouts of a model with a hundred thousand tensors."""
_LENGTH = struct.Struct(">I")

Key = TypeVar("Key")


class Deadline:
    """A point in time up to which something may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._at = seconds, time.monotonic() + seconds

    def anew(self) -> Deadline:
        """As long as this one, from now on: what was waited for whoever is gone is not taken from the others."""
        return Deadline(self.seconds)

    @property
    def left(self) -> float:
        """Seconds; at least a little, so that what is there already is still taken."""
        return max(self._at - time.monotonic(), 0.001)

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._at


class Connection:
    """One end of an authenticated connection. One thread may send while another receives.

    Every method raises PeerLost after the deadline, or when the other end is gone.
    """

    def __init__(self, sock: socket.socket, peer: str, hello: Mapping[str, Any]) -> None:
        self.peer, self.hello = peer, hello
        """Who the other end is, for messages, and what whoever connected said of itself."""
        self._socket, self.host = sock, sock.getsockname()[0]
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: Mapping[str, Any], deadline: Deadline) -> None:
        """Send a JSON object."""
        body = json.dumps(message, separators=(",", ":")).encode()
        if len(body) > MESSAGE_BYTES:
            raise TransferError(f"a message of {len(body)} bytes; at most {MESSAGE_BYTES} can be sent")
        self.send_raw(_LENGTH.pack(len(body)) + body, deadline)

    def receive(self, deadline: Deadline | None) -> dict[str, Any]:
        """The next JSON object; without a deadline, however long it takes to begin."""
        head = bytearray(_LENGTH.size)
        self.receive_raw(head, deadline)
        (size,) = _LENGTH.unpack(head)
        if size > MESSAGE_BYTES:
            self.close()
            raise TransferError(f"{self.peer} sent a message of {size} bytes; at most {MESSAGE_BYTES} go")
        body = bytearray()
        while len(body) < size:  # in pieces: memory is taken as bytes arrive, whatever the length said
            piece = bytearray(min(size - len(body), 2**20))
            self.receive_raw(piece, deadline or Deadline(HELLO_SECONDS))
            body += piece
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self.close()
            raise TransferError(f"{self.peer} sent something that is not a JSON object")
        return message

    def send_raw(self, data: Any, deadline: Deadline) -> None:
        """Send all bytes of a buffer."""
        view = memoryview(data).cast("B")
        while view:
            sent = self._wait(socket.SO_SNDTIMEO, "takes no more", deadline, self._socket.send, view)
            view = view[sent:]
            self._check(view, "takes no more", deadline)

    def receive_raw(self, into: Any, deadline: Deadline | None) -> None:
        """Fill a buffer."""
        view = memoryview(into).cast("B")
        take, every = self._socket.recv_into, socket.MSG_WAITALL
        while view:
            came = self._wait(socket.SO_RCVTIMEO, "is silent", deadline, take, view, len(view), every)
            view = view[came:]
            self._check(view, "is silent", deadline)

    def _check(self, rest: memoryview, late: str, limit: Deadline | None) -> None:
        """The socket's own limit begins anew with every call: a peer that moves a byte in each would never be late."""
        if rest and limit is not None and limit.over:
            raise PeerLost(f"{self.peer} {late}: no answer within the time limit")

    def _wait(
        self, option: int, late: str, limit: Deadline | None, call: Callable[..., int], *given: Any
    ) -> int:
        """The bytes that a call of the socket's has moved within the time."""
        left, reason = 0.0 if limit is None else limit.left, ""
        try:
            seconds = struct.pack("ll", int(left), int(left % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, option, seconds)
            if count := call(*given):
                return count
        except BlockingIOError:
            raise PeerLost(f"{self.peer} {late}: no answer within the time limit") from None
        except OSError as error:
            reason = f" ({error})"
        raise PeerLost(f"the connection with {self.peer} is gone{reason}")

    def alive(self) -> bool:
        """Whether the other end has not closed the connection, as far as this host has heard."""
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Close it; whoever waits on either end fails now."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def at_once(do: Callable[[Key], object], keys: Iterable[Key]) -> dict[Key, Exception]:
    """`do(key)` for each, in threads of their own, until all have ended; what was raised, in the order of time."""
    raised: dict[Key, Exception] = {}

    def one(key: Key) -> None:
        try:
            do(key)
        except Exception as error:
            raised[key] = error

    threads = [threading.Thread(target=one, args=(key,), daemon=True) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def connect(host: str, port: int, secret: bytes, hello: Mapping[str, Any], deadline: Deadline) -> Connection:
    """Connect to a listener and prove to each other that both know the secret.

    Raises PeerLost where nobody is there, refused the handshake, or does not answer in time, TransferError where the
    other end has another secret.
    """
    peer = f"the trainer at {host}:{port}"
    try:
        sock = socket.create_connection((host, port), timeout=deadline.left)
    except (OSError, OverflowError) as error:  # the latter: no port
        here = host.startswith("127.") or host in ("::1", "localhost")
        why = "; a worker on another host needs the address that Options(host=...) gives" if here else ""
        raise PeerLost(f"no trainer at {host}:{port} ({error}){why}") from None
    connection = Connection(sock, peer, hello)
    try:
        theirs, mine = bytearray(NONCE), secrets.token_bytes(NONCE)
        connection.receive_raw(theirs, deadline)
        body = json.dumps({**hello, "nonce": mine.hex()}).encode()
        connection.send_raw(_LENGTH.pack(len(body)) + body + _mac(secret, b"to", theirs, body), deadline)
        proof = bytearray(MAC)
        connection.receive_raw(proof, deadline)
    except TransferError as error:
        connection.close()
        raise PeerLost(f"{peer} did not let this worker in ({error})") from None
    if not hmac.compare_digest(proof, _mac(secret, b"from", mine, theirs)):
        connection.close()
        raise TransferError(f"{peer} does not know the secret of this run")
    return connection


def _mac(secret: bytes, *parts: bytes | bytearray) -> bytes:
    return hmac.digest(secret, b"titan".join(parts), "sha256")


class Listener:
    """Accepts connections of those who know the secret, in a thread of its own, and keeps them until they are taken."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        """Listens on this address alone; port 0 takes a free one. Raises TransferError where it cannot."""
        self._secret = secret
        try:
            family = socket.getaddrinfo(host, None)[0][0]
            self._socket = socket.create_server((host, port), family=family, backlog=1024)
        except (OSError, OverflowError, UnicodeError) as error:  # the latter two: no port, no name
            raise TransferError(f"cannot listen at {host}:{port} ({error})") from None
        self._socket.setblocking(False)
        self.host, self.port = host, self._socket.getsockname()[1]
        self._changed = threading.Condition()
        self._arrived: list[Connection] = []
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._accept())
        self._thread = threading.Thread(target=self._run, name="titan-listener", daemon=True)
        self._thread.start()

    def take(self, count: int, deadline: Deadline, **wanted: Any) -> list[Connection]:
        """Connections whose hello says what is wanted, once `count` of them are there, and all that wait by then.

        Raises PeerLost after the deadline.
        """
        with self._changed:
            while True:
                found = [each for each in self._arrived if wanted.items() <= each.hello.items()]
                if len(found) >= count:
                    rest = [each for each in self._arrived if each not in found]
                    self._arrived = [each for each in rest if each.alive()]
                    for each in rest:
                        if each not in self._arrived:
                            each.close()  # of a connection that came to nothing
                    return found
                if deadline.over:
                    raise PeerLost(f"{len(found)} of {count} connected within the time limit")
                self._changed.wait(deadline.left)

    def close(self) -> None:
        """Stop listening and close what nobody took."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
        self._socket.close()
        for each in self._arrived:
            each.close()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    async def _accept(self) -> None:
        under_way: deque[asyncio.Task[None]] = deque()
        async with asyncio.TaskGroup() as greetings:
            while True:
                try:
                    sock, address = await self._loop.sock_accept(self._socket)
                except OSError:  # out of file descriptors, or the caller has hung up already
                    await asyncio.sleep(0.01)
                    continue
                under_way = deque(task for task in under_way if not task.done())
                if len(under_way) >= GREETINGS:
                    under_way.popleft().cancel()
                under_way.append(greetings.create_task(self._greet(sock, "{}:{}".format(*address))))

    async def _greet(self, sock: socket.socket, peer: str) -> None:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello, answer = await self._identify(sock)
            with self._changed:  # whoever knows that it is let in is there to be taken
                sock.send(answer)
                self._arrived.append(Connection(sock, f"{hello.get('who', 'a peer')} ({peer})", hello))
                self._changed.notify_all()
        except BaseException as error:  # whoever it was does not belong here, and gets no reason
            sock.close()
            if not isinstance(error, Exception):
                raise

    async def _identify(self, sock: socket.socket) -> tuple[dict[str, Any], bytes]:
        nonce = secrets.token_bytes(NONCE)
        await self._loop.sock_sendall(sock, nonce)
        (size,) = _LENGTH.unpack(await self._read(sock, _LENGTH.size))
        if size > HELLO_BYTES:
            raise ValueError("too long")
        body = await self._read(sock, size)
        if not hmac.compare_digest(await self._read(sock, MAC), _mac(self._secret, b"to", nonce, body)):
            raise ValueError("wrong secret")
        hello = json.loads(body)
        return hello, _mac(self._secret, b"from", bytes.fromhex(hello["nonce"]), nonce)

    async def _read(self, sock: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = await self._loop.sock_recv(sock, size - len(data))
            if not piece:
                raise ConnectionError
            data += piece
        return data
