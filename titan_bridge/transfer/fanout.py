"""Several engines behind one client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from titan_bridge.transfer.options import PauseMode


class FanOutClient:
    """Several engines that take every update together: all of them, or none."""

    def __init__(self, clients: Iterable[Any]) -> None:
        self.clients = tuple(clients)
        self.engines = len(self.clients)
        self._paused: Sequence[Any] = self.clients
        """What `resume_generation` resumes."""
        optional = {
            "is_paused": lambda: all(self._all("is_paused")),
            "pause_generation": self._pause,
            "resume_generation": self._resume,
            "reset_prefix_cache": lambda: self._all("reset_prefix_cache"),
            "update_weight_version": lambda version: self._all("update_weight_version", version),
        }
        for method, function in optional.items():
            if all(hasattr(client, method) for client in self.clients):
                setattr(self, method, function)

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._each(
            "init_weight_transfer_engine",
            [({**init_info, "engine": i},) for i in range(self.engines)],
            self.clients,
        )

    def shutdown_weight_transfer_engine(self) -> None:
        self._all("shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update")

    def _pause(self, mode: PauseMode) -> None:
        """Those that are not paused: a pause of somebody else's stays when this one ends."""
        self._paused = [c for c in self.clients if not (hasattr(c, "is_paused") and c.is_paused())]
        self._all("pause_generation", mode, of=self._paused)

    def _resume(self) -> None:
        paused, self._paused = self._paused, self.clients
        self._all("resume_generation", of=paused)

    def _all(self, method: str, *args: Any, of: Sequence[Any] | None = None) -> list[Any]:
        clients = self.clients if of is None else of
        return self._each(method, [args] * len(clients), clients)

    def _each(self, method: str, arguments: Sequence[tuple], clients: Sequence[Any]) -> list[Any]:
        # Together, because their workers wait for each other.
        with ThreadPoolExecutor(self.engines) as pool:
            calls = [
                pool.submit(getattr(client, method), *args)
                for client, args in zip(clients, arguments, strict=True)
            ]
        return [call.result() for call in calls]
