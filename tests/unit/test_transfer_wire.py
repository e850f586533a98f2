"""Who does not know the secret reads and changes nothing; what is malformed, oversized or cut off ends in one error."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from titan_bridge.transfer import wire
from titan_bridge.transfer.errors import PeerLost, TransferError
from titan_bridge.transfer.wire import Connection, Deadline, Listener, connect

SECRET = b"s" * 32


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener("127.0.0.1", 0, SECRET)
    yield listener
    listener.close()


def pair(listener: Listener) -> tuple[Connection, Connection]:
    here = connect("127.0.0.1", listener.port, SECRET, {"role": "data"}, Deadline(60))
    (there,) = listener.take(1, Deadline(60), role="data")
    return here, there


def test_messages_and_bytes_arrive_both_ways(listener):
    here, there = pair(listener)
    assert there.hello["role"] == "data"
    data = secrets.token_bytes(10_000_000)
    thread = threading.Thread(
        target=lambda: (here.send({"n": 1}, Deadline(60)), here.send_raw(data, Deadline(60)))
    )
    thread.start()
    assert there.receive(Deadline(60)) == {"n": 1}
    there.receive_raw(got := bytearray(len(data)), Deadline(60))
    thread.join()
    assert got == data
    there.send({"text": "ä"}, Deadline(60))
    assert here.receive(None) == {"text": "ä"}


def test_it_listens_on_the_address_that_was_given_alone(listener):
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", listener.port), timeout=2)
    with pytest.raises(TransferError, match=r"cannot listen at 192\.0\.2\.1:0"):
        Listener("192.0.2.1", 0, SECRET)


def hello(body: bytes, length: int | None = None, secret: bytes = SECRET, nonce: bytes = b"") -> bytes:
    return (
        struct.pack(">I", len(body) if length is None else length)
        + body
        + wire._mac(secret, b"to", nonce, body)
    )


GOOD = json.dumps({"role": "data", "nonce": "00" * 32}).encode()


@pytest.mark.parametrize(
    "answer",
    [
        lambda nonce: b"GET / HTTP/1.1\r\n\r\n" + b"x" * 4096,
        lambda nonce: hello(GOOD, secret=b"x" * 32, nonce=nonce),
        lambda nonce: hello(GOOD, nonce=b"n" * 32),  # another connection's
        lambda nonce: hello(GOOD, length=2**32 - 1, nonce=nonce),
        lambda nonce: hello(b"[1]", nonce=nonce),
        lambda nonce: hello(b"\xff", nonce=nonce),
        lambda nonce: hello(b'{"role": "data"}', nonce=nonce),
        lambda nonce: hello(b"[" * 4000, nonce=nonce),
        lambda nonce: hello(GOOD, nonce=nonce)[:40],
    ],
    ids=[
        "garbage",
        "wrong secret",
        "replayed",
        "oversized",
        "no object",
        "no JSON",
        "no nonce",
        "nested",
        "cut off",
    ],
)
def test_whoever_does_not_know_the_secret_is_not_let_in(listener, answer):
    with socket.create_connection(("127.0.0.1", listener.port), timeout=10) as stranger:
        nonce = stranger.recv(32, socket.MSG_WAITALL)
        with contextlib.suppress(OSError):  # it may have been shown the door by now
            stranger.sendall(answer(nonce))
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""  # neither an answer nor a reason
    pair(listener)
    assert not listener._arrived


def test_a_worker_does_not_talk_to_a_trainer_without_the_secret(listener):
    with pytest.raises(PeerLost, match="did not let this worker in"):
        connect("127.0.0.1", listener.port, b"t" * 32, {"role": "data"}, Deadline(60))
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def serve() -> None:
            with impostor.accept()[0] as sock:
                sock.sendall(b"n" * 32)
                sock.recv(4096)
                sock.sendall(b"m" * 32)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TransferError, match="does not know the secret"):
            connect("127.0.0.1", impostor.getsockname()[1], SECRET, {}, Deadline(60))
        thread.join()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (struct.pack(">I", 2**32 - 1), "a message of 4294967295 bytes; at most"),
        (struct.pack(">I", 5) + b"[1,2]", "not a JSON object"),
        (struct.pack(">I", 4) + b"\xff\xfe\x00\x01", "not a JSON object"),
        (struct.pack(">I", 20_000) + b"[" * 20_000, "not a JSON object"),
    ],
)
def test_a_malformed_message_is_one_error(listener, sent, reason):
    here, there = pair(listener)
    here.send_raw(sent, Deadline(60))
    with pytest.raises(TransferError, match=reason):
        there.receive(Deadline(60))


def test_a_message_that_is_cut_off_late_or_not_taken_is_one_error(listener):
    here, there = pair(listener)
    here.send_raw(struct.pack(">I", 10) + b"{", Deadline(60))
    started = time.monotonic()
    with pytest.raises(PeerLost, match="is silent: no answer within the time limit"):
        there.receive(Deadline(0.3))
    with pytest.raises(PeerLost, match="takes no more"):
        here.send_raw(bytes(2**26), Deadline(0.3))
    assert time.monotonic() - started < 20
    assert there.alive()
    here.close()
    with pytest.raises(PeerLost, match="is gone"):
        there.receive_raw(bytearray(2**27), Deadline(60))
    assert not there.alive()


def test_a_peer_that_moves_a_few_bytes_at_a_time_is_late_too(listener):
    here, there = pair(listener)
    started = time.monotonic()

    def trickle() -> None:
        with contextlib.suppress(PeerLost):
            while time.monotonic() - started < 8:
                here.send_raw(b"x", Deadline(60))
                time.sleep(0.0002)

    thread = threading.Thread(target=trickle)
    thread.start()
    with pytest.raises(PeerLost, match="is silent: no answer within the time limit"):
        there.receive_raw(bytearray(10**6), Deadline(0.3))
    assert time.monotonic() - started < 6
    there.close()
    thread.join()


def test_connections_live_in_a_process_with_many_open_files(listener):
    with contextlib.ExitStack() as files:
        for _ in range(1100):
            files.enter_context(open(os.devnull))
        here, there = pair(listener)
        assert there._socket.fileno() > 1024  # what select() can take
        assert here.alive()
        assert there.alive()
        here.close()
        there.close()
        assert not there.alive()


def test_of_many_strangers_that_say_nothing_the_first_have_to_go(listener):
    with contextlib.ExitStack() as stack:
        strangers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", listener.port), timeout=60))
            for _ in range(wire.GREETINGS + 9)
        ]
        for _ in pair(listener):
            pass
        started = time.monotonic()
        for stranger in strangers[:9]:
            assert len(stranger.recv(32, socket.MSG_WAITALL)) == 32
            assert stranger.recv(1) == b""
        assert time.monotonic() - started < wire.HELLO_SECONDS / 2
        strangers[-1].setblocking(False)
        assert len(strangers[-1].recv(32)) == 32
        with pytest.raises(BlockingIOError):
            strangers[-1].recv(1)


def test_two_thousand_strangers_do_not_keep_a_worker_out(listener):
    """Some say nothing and stay, some talk nonsense, some hang up at once; the usual way in stays quick."""
    strangers = []
    for number in range(2000):
        stranger = socket.create_connection(("127.0.0.1", listener.port), timeout=10)
        if number % 3 == 1:
            with contextlib.suppress(OSError):
                stranger.sendall(secrets.token_bytes(600))
        if number % 3 == 2 or number > 900:
            stranger.close()
        else:
            strangers.append(stranger)
        if number % 100 == 0:
            started = time.monotonic()
            for connection in pair(listener):
                connection.close()
            # A stranger that is waited for costs seconds, and there are hundreds.
            assert time.monotonic() - started < 20
    assert len(strangers) > 500
    for stranger in strangers:
        stranger.close()
