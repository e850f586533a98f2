"""Where files grow until all of them are there: a hidden directory beside the target, renamed at the end.

    .NAME.partial/plan.json          which run this is: a digest of source, destination and options
    .NAME.partial/done-0.jsonl       one line for each part that a process finished, with checksums
    .NAME.partial/FILE.part          a file that is being written
    .NAME.partial/FILE               a finished file

Whatever kills the run, the target is either as it was before or complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titan_bridge.checkpoint.open import is_checkpoint
from titan_bridge.errors import BridgeError

_PLAN, _DONE, _LOCK = "plan.json", "done-{}.jsonl", "lock"
PART = ".part"


@dataclass(frozen=True, kw_only=True)
class Span:
    """Bytes that were written: where, how many, and their CRC-32."""

    offset: int
    length: int
    crc: int


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """What is known of a finished part."""

    part: str
    spans: Mapping[str, tuple[Span, ...]]
    """By file."""
    nan: Mapping[str, int]
    """NaNs by tensor, where there are any."""
    inf: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            **asdict(self),
            "spans": {f: [[s.offset, s.length, s.crc] for s in v] for f, v in self.spans.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PartResult:
        """The reverse of `to_json`."""
        spans = {
            file: tuple(Span(offset=a, length=b, crc=c) for a, b, c in rows)
            for file, rows in data["spans"].items()
        }
        return cls(part=data["part"], spans=spans, nan=data["nan"], inf=data["inf"])


class Staging:
    """The staging directory of one target. `begin` and `publish` are for one process, the rest for all."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.parent / f".{target.name}.partial"
        self._old = target.parent / f".{target.name}.old"
        self._lock: int | None = None

    def check(self, *, overwrite: bool) -> None:
        """Raise BridgeError when the target may not be written; changes nothing."""
        target = self.target
        if target.is_symlink():
            raise BridgeError(f"{target} is a symbolic link; give the directory itself")
        if target.exists() and not target.is_dir():
            raise BridgeError(f"{target} is a file; give a directory")
        if target.exists() and any(target.iterdir()):
            if not overwrite:
                raise BridgeError(f"{target} is not empty; choose another directory, or --overwrite it")
            if not is_checkpoint(target):
                raise BridgeError(f"{target} holds no checkpoint; --overwrite replaces nothing else")
        if self._old.exists() and target.exists():
            raise BridgeError(f"{self._old} is left from a run that was replacing {target}; remove it")

    def begin(self, digest: str, *, resume: bool) -> None:
        """Make the directory, or take over that of a run with the same digest.

        Raises:
            BridgeError: Another process is at it; or with `resume`, it belongs to a different run.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if self._old.exists() and not self.target.exists():
            self._old.rename(self.target)  # that run was killed between its two renames
        if self.path.exists() and not (self.path / _PLAN).exists() and any(self.path.iterdir()):
            raise BridgeError(f"{self.path} is in the way and not ours; remove it")
        self.path.mkdir(exist_ok=True)
        self._take_lock()
        plan = self.path / _PLAN
        if plan.exists():
            if resume and _read_digest(plan) == digest:
                return
            if resume:
                raise BridgeError(
                    f"{self.path} was begun with another source, other options or other processes; "
                    "run without --resume to start again"
                )
            self._clear()
        plan.write_text(json.dumps({"digest": digest}) + "\n")

    def results(self) -> dict[str, PartResult]:
        """Parts that were finished, by any process, and whose files are still there."""
        found = {}
        for journal in sorted(self.path.glob(_DONE.format("*"))):
            for line in journal.read_text().splitlines():
                try:
                    result = PartResult.from_json(json.loads(line))
                except (ValueError, TypeError, KeyError):
                    continue  # the last line of a process that was killed
                if all((self.path / file).is_file() for file in result.spans):
                    found[result.part] = result
        return found

    def finish(self, result: PartResult, rank: int, *, fsync: bool) -> None:
        """Give the files of a part their names and write it down."""
        for file in result.spans:
            part = self.path / (file + PART)
            if fsync:
                sync(part)
            part.rename(self.path / file)
        with (self.path / _DONE.format(rank)).open("a") as journal:
            journal.write(json.dumps(result.to_json()) + "\n")
            journal.flush()
            if fsync:
                os.fsync(journal.fileno())

    def publish(self, files: Iterable[str], *, overwrite: bool, fsync: bool) -> None:
        """Check that all files are there, remove what is ours alone, and give the directory its name."""
        self.check(overwrite=overwrite)  # hours may have gone by
        missing = [file for file in files if not (self.path / file).is_file()]
        if missing:
            raise BridgeError(f"{self.path}: {missing[0]} is not there; another process removed it?")
        for own in [_PLAN, _LOCK, *(path.name for path in self.path.glob(_DONE.format("*")))]:
            (self.path / own).unlink(missing_ok=True)
        if fsync:
            sync(self.path)
        if self.target.exists() and any(self.target.iterdir()):
            self.target.rename(self._old)
            self.path.rename(self.target)
            shutil.rmtree(self._old)
        else:
            if self.target.exists():
                self.target.rmdir()
            self.path.rename(self.target)
        if fsync:
            sync(self.target.parent)
        self.release()

    def release(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise BridgeError(
                f"another process is writing {self.target} (it holds {self.path / _LOCK})"
            ) from None

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.name != _LOCK:
                path.unlink()


def sync(path: Path) -> None:
    """Have a file or directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_digest(plan: Path) -> str | None:
    try:
        return json.loads(plan.read_text())["digest"]
    except (ValueError, KeyError, TypeError):
        return None
