"""The client of a server: what it says when there is no server, or one without the routes; and what it imports."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading

import pytest

from titan_bridge.transfer import HTTPClient
from titan_bridge.transfer.plain import free_port


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
        server.shutdown()


def test_a_trainer_needs_no_vllm():
    check = (
        "import sys, titan_bridge.transfer; sys.exit(any(m in sys.modules for m in ('vllm', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
