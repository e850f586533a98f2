"""A vLLM server as a trainer's client reaches it: no vLLM is needed where the trainer runs."""

from __future__ import annotations

from typing import Any

import httpx

from titan_bridge.transfer.guard import RESET, RESUME, Guard
from titan_bridge.transfer.options import PauseMode


class HTTPClient:
    """The control routes of a server that was started with `VLLM_SERVER_DEV_MODE=1`.

    Every call raises RuntimeError with what the server said, or that it cannot be reached. A server that is paused when
    this process ends, however it ends, is resumed by a `Guard`.
    """

    def __init__(self, base_url: str, timeout: float = 300) -> None:
        """`base_url`: for instance "http://engine:8000". `timeout`: seconds that one call may take."""
        self.base_url = base_url.rstrip("/")
        self._guard = Guard(self.base_url)
        # Updates are far apart: a kept connection would mostly be one that the server has closed.
        self._http = httpx.Client(timeout=timeout, limits=httpx.Limits(max_keepalive_connections=0))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("init_weight_transfer_engine", {"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self._post("shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self._post("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post(
            "finish_weight_update", None if weight_version is None else {"weight_version": weight_version}
        )

    def pause_generation(self, mode: PauseMode) -> None:
        """Freeze ("keep"), finish ("wait") or end ("abort") the requests in flight."""
        self._guard.paused()
        self._post(f"pause?mode={mode}")

    def resume_generation(self) -> None:
        self._post(RESUME)
        self._guard.resumed()

    def is_paused(self) -> bool:
        """Whether anybody has paused the server."""
        return self._request("GET", "is_paused").json()["is_paused"]

    def reset_prefix_cache(self) -> None:
        """Frozen requests start over on the new weights."""
        self._post(RESET)

    def update_weight_version(self, version: str) -> None:
        self._post("update_weight_version", {"new_version": version})

    def close(self) -> None:
        """Close what this client holds; a server that it has paused is resumed."""
        self._guard.close()
        self._http.close()

    def _post(self, path: str, body: dict[str, Any] | None = None) -> None:
        self._request("POST", path, body)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            response = self._http.request(method, f"{self.base_url}/{path}", json=body)
        except httpx.HTTPError as error:
            raise RuntimeError(f"{method} {self.base_url}/{path}: {error or type(error).__name__}") from None
        if not response.is_success:
            hint = "; start the server with VLLM_SERVER_DEV_MODE=1" if response.status_code == 404 else ""
            raise RuntimeError(f"{method} /{path}: {response.status_code} {response.text[:500]}{hint}")
        return response
