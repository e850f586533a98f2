"""The client of a server: what it says when there is no server, or one without the routes; and what it imports."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from titan_bridge.ports import free_port
from titan_bridge.transfer import FanOutClient, HTTPClient
from titan_bridge.transfer.control import Control
from titan_bridge.transfer.dense import Deadline


def test_a_server_that_is_not_there_is_named():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RuntimeError, match=f"^POST {url}/start_weight_update: .*refused"):
        HTTPClient(f"{url}/").start_weight_update()


class NoRoutes(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_without_the_routes_gets_a_hint():
    with http.server.HTTPServer(("127.0.0.1", 0), NoRoutes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = HTTPClient(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(RuntimeError, match=r"(?s)^POST /pause\?mode=keep: 404 .*VLLM_SERVER_DEV_MODE=1$"):
            client.pause_generation("keep")
        client.close()
        server.shutdown()


class Recorder(http.server.BaseHTTPRequestHandler):
    """Says yes, and remembers what it was asked."""

    asked: list[str]

    def do_POST(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Pausable(Recorder):
    """Knows whether it is paused, as a vLLM server does."""

    paused: bool

    def do_POST(self) -> None:
        if self.path.startswith("/pause"):
            type(self).paused = True
        elif self.path == "/resume":
            type(self).paused = False
        super().do_POST()

    def do_GET(self) -> None:
        assert self.path == "/is_paused"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"is_paused": self.paused}).encode())


@contextlib.contextmanager
def pausable(*, paused: bool) -> Iterator[tuple[HTTPClient, type[Pausable]]]:
    handler = type("Handler", (Pausable,), {"asked": [], "paused": paused})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = HTTPClient(f"http://127.0.0.1:{server.server_port}")
        try:
            yield client, handler
        finally:
            client.close()
            server.shutdown()


@pytest.mark.parametrize("before", [(False,), (True,), (False, True), (True, True)])
def test_an_update_resumes_only_what_it_paused(before):
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(pausable(paused=paused)) for paused in before]
        clients = [client for client, _ in servers]
        control = Control(clients[0] if len(before) == 1 else FanOutClient(clients), None, "keep")
        for _ in range(2):
            paused = control.pause(Deadline(30))
            assert all(handler.paused for _, handler in servers)
            if paused:
                control.resume()
            assert tuple(handler.paused for _, handler in servers) == before
    for was, (_, handler) in zip(before, servers, strict=True):
        assert handler.asked == ([] if was else ["/pause?mode=keep", "/resume"] * 2)


@pytest.mark.parametrize("how", ["killed", "ended"])
@pytest.mark.parametrize("paused", [True, False])
def test_a_trainer_that_ends_leaves_no_server_paused(how, paused):
    handler = type("Handler", (Recorder,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        lines = ["import os, signal, sys", "from titan_bridge.transfer.http import HTTPClient"]
        lines += [f"client = HTTPClient({url!r})", "client.pause_generation('keep')"]
        lines += [] if paused else ["client.resume_generation()"]
        lines += ["print(client._guard._process.pid, flush=True)"]
        lines += ["os.kill(os.getpid(), signal.SIGKILL)"] if how == "killed" else []
        done = subprocess.run([sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, check=False)
        assert done.returncode == (-signal.SIGKILL if how == "killed" else 0)
        os.waitpid(int(done.stdout), 0)  # the guard is ours now: see conftest.py
        server.shutdown()
    resumed = ["/reset_prefix_cache?reset_running_requests=true", "/resume"]
    assert handler.asked == ["/pause?mode=keep", *(resumed if paused else ["/resume"])]


def test_a_trainer_needs_no_vllm():
    check = (
        "import sys, titan_bridge.transfer; sys.exit(any(m in sys.modules for m in ('vllm', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
