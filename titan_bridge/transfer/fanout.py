"""Several engines behind one client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class FanOutClient:
    """Several engines that take every update together: all of them, or none."""

    def __init__(self, clients: Iterable[Any]) -> None:
        self.clients = tuple(clients)
        self.engines = len(self.clients)
        optional = ("pause_generation", "resume_generation", "reset_prefix_cache", "update_weight_version")
        for method in optional:
            if all(hasattr(client, method) for client in self.clients):
                setattr(self, method, lambda *args, method=method: self._all(method, *args))

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._each(
            "init_weight_transfer_engine", [({**init_info, "engine": i},) for i in range(self.engines)]
        )

    def shutdown_weight_transfer_engine(self) -> None:
        self._all("shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update")

    def _all(self, method: str, *args: Any) -> None:
        self._each(method, [args] * self.engines)

    def _each(self, method: str, arguments: list[tuple]) -> None:
        # Together, because their workers wait for each other.
        with ThreadPoolExecutor(self.engines) as pool:
            calls = [
                pool.submit(getattr(client, method), *args)
                for client, args in zip(self.clients, arguments, strict=True)
            ]
        for call in calls:
            call.result()
