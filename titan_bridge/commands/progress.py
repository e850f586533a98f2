"""Bars on stderr with bytes, bytes a second and the time left."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


class Bars:
    """One bar for each kind of work that has bytes to do; nothing where stderr is no terminal."""

    def __init__(self, totals: Mapping[str, int], *, shown: bool = True) -> None:
        self._totals = totals if shown and sys.stderr.isatty() else {}
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        if any(self._totals.values()):
            from rich import progress
            from rich.console import Console

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._tasks = {
                what: self._bars.add_task(what, total=total) for what, total in self._totals.items() if total
            }
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advance(self, what: str, count: int) -> None:
        """`count` more bytes of `what`."""
        if what in self._tasks:
            self._bars.advance(self._tasks[what], count)
