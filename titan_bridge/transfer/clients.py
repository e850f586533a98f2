"""How trainer rank 0 reaches an engine: a vLLM server over HTTP, an `LLM` in this process, or a Ray actor.

Anything with the methods of `Client` does, vLLM's own clients included. No vLLM is needed here.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable
from typing import Any

import httpx

from titan_bridge.errors import BridgeError
from titan_bridge.transfer.errors import PeerLost


class Client:
    """vLLM's `VLLMWeightSyncClient`: any object with its four methods reaches an engine.

    `address`, the host at which the engine is, is used if it is there.
    """

    _call: Callable[..., None]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", {"weight_version": weight_version} if weight_version else None)


class HTTPClient(Client):
    """The routes of a server that was started with `VLLM_SERVER_DEV_MODE=1`; proxies of the environment are not used.

    Every call raises RuntimeError with what the server said, or PeerLost where it cannot be reached.
    """

    def __init__(self, base_url: str, timeout: float | None = None) -> None:
        """`timeout`: seconds that one call may take; None: for as long as the trainer's own limits let it."""
        self.base_url = base_url.rstrip("/")
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BridgeError(f"the engine is {base_url!r}; give a URL such as http://localhost:8000")
        self.address = parts.hostname
        # Updates are far apart: a kept connection would mostly be one that the server has closed.
        limits = httpx.Limits(max_keepalive_connections=0)
        # Certificates are read, and kept, only where they are needed. With a transport of its own a client uses none of
        # the environment's proxies, which would read the run's secret.
        way = httpx.HTTPTransport(limits=limits, verify=parts.scheme == "https")
        self._http = httpx.Client(timeout=timeout, transport=way)

    def __repr__(self) -> str:
        return self.base_url

    def shutdown_weight_transfer_engine(self) -> None:
        self._call("shutdown_weight_transfer_engine")

    def close(self) -> None:
        self._http.close()

    def _call(self, name: str, request: dict[str, Any] | None = None) -> None:
        try:
            response = self._http.post(f"{self.base_url}/{name}", json=request)
        except httpx.HTTPError as error:
            raise PeerLost(f"POST {self.base_url}/{name}: {error or type(error).__name__}") from None
        if not response.is_success:
            hint = "; start the server with VLLM_SERVER_DEV_MODE=1" if response.status_code == 404 else ""
            raise RuntimeError(f"POST /{name}: {response.status_code} {response.text[:500]}{hint}")


class LLMClient(Client):
    """An offline `vllm.LLM` in this process."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def _call(self, name: str, request: dict[str, Any] | None = None) -> None:
        getattr(self._llm, name)(*([request] if request else ()))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)


def client_of(engine: Any) -> Client:
    """The client of an engine given as a URL, an `LLM`, or a client already. Raises BridgeError for anything else."""
    if isinstance(engine, str):
        return HTTPClient(engine)
    if hasattr(engine, "llm_engine"):
        return LLMClient(engine)
    methods = [name for name in vars(Client) if not name.startswith("_")]
    if lacks := [name for name in methods if not callable(getattr(engine, name, None))]:
        allowed = "a URL, a client (for a Ray actor vLLM's RayVLLMWeightSyncClient), an LLM"
        raise BridgeError(f"the engine is a {type(engine).__name__} without {lacks[0]}; allowed: {allowed}")
    return engine
