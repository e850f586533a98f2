"""The client of a server: what it says when there is no server, or one without the routes; and what it imports."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time

import pytest
import torch

from titan_bridge.errors import BridgeError
from titan_bridge.ports import free_port
from titan_bridge.transfer import HTTPClient, Options, Trainer, TransferError
from titan_bridge.transfer.engines import Engine, Engines
from titan_bridge.transfer.errors import PeerLost
from titan_bridge.transfer.wire import Deadline


def test_a_server_that_is_not_there_is_named():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RuntimeError, match=f"^POST {url}/start_weight_update: .*refused"):
        HTTPClient(f"{url}/").start_weight_update()


def test_no_proxy_of_the_environment_reads_what_is_said(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "")
    with http.server.HTTPServer(("127.0.0.1", 0), NoRoutes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = HTTPClient(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(RuntimeError, match=r"^POST /start_weight_update: 404"):
            client.start_weight_update()
        client.close()
        server.shutdown()


class NoRoutes(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_without_the_routes_gets_a_hint():
    with http.server.HTTPServer(("127.0.0.1", 0), NoRoutes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = HTTPClient(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(
            RuntimeError, match=r"(?s)^POST /start_weight_update: 404 .*VLLM_SERVER_DEV_MODE=1$"
        ):
            client.start_weight_update()
        client.close()
        server.shutdown()


def test_what_is_no_engine_is_refused():
    for engine, reason in (
        ("localhost:8000", "give a URL such as http://localhost:8000"),
        (object(), "the engine is a object without init_weight_transfer_engine; allowed: a URL, a client"),
    ):
        with pytest.raises(BridgeError, match=reason):
            Trainer({"w": torch.ones(2)}, engine)


def test_a_trainer_of_a_server_that_is_not_there_fails_at_once():
    port = free_port()
    with Trainer({"w": torch.ones(2)}, f"http://127.0.0.1:{port}") as trainer:
        for _ in range(2):
            with pytest.raises(TransferError, match=f"^http://127.0.0.1:{port} is gone: POST .*refused"):
                trainer.send()
        with pytest.raises(BridgeError, match="no engine 'x'; there are http"):
            trainer.engines.remove("x")
        trainer.engines.remove(f"http://127.0.0.1:{port}")
        with pytest.raises(BridgeError, match="the trainer has no engine"):
            trainer.send()


def test_a_call_for_which_no_time_is_left_is_not_made_and_named():
    called: list[str] = []
    engine = Engine(name="e", client=HTTPClient("http://127.0.0.1:1"))
    calls = {"start": lambda: time.sleep(0.3), "finish": lambda: called.append("finish")}
    with pytest.raises(PeerLost, match=r"^e is gone: no time left for finish$"):
        engine.call(calls, Deadline(0.1))
    assert not called


def test_an_engine_gets_the_first_name_that_is_free():
    engines = Engines()
    client = HTTPClient("http://127.0.0.1:1")
    assert [engines.add(client) for _ in range(2)] == ["engine0", "engine1"]
    engines.remove("engine0")
    assert [engines.add(client) for _ in range(2)] == ["engine0", "engine2"]


@pytest.mark.parametrize("given", [{"pause": None}, {"on_dead": "wait"}, {"seconds": 0}, {"host": "0.0.0.0"}])
def test_an_option_that_is_not_allowed_is_named(given):
    ((name, _),) = given.items()
    with pytest.raises(BridgeError, match=rf"Options\.{name} is .*"):
        Options(**given)


def test_a_trainer_needs_no_vllm():
    check = (
        "import sys, titan_bridge.transfer; sys.exit(any(m in sys.modules for m in ('vllm', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
