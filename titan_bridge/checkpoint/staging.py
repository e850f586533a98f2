"""Where files grow until all of them are there: a hidden directory beside the target, renamed at the end.

    .NAME.partial/.reshard.json      which run this is: a digest of source, destination and options
    .NAME.partial/done-0.jsonl       one line for each file that a process finished, with its CRC
    .NAME.partial/FILE.part          a file that is being written
    .NAME.partial/FILE               a finished file

Whatever kills the run, the target is either as it was before or complete. A target that is replaced changes places
with the staging directory in one step, so there is one at every moment; without a system call for that it is renamed
to .NAME.old first. A target with a .reshard.json was published by a run that was killed before it had tidied up; the
next run does that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from titan_bridge.checkpoint.open import is_checkpoint, open_checkpoint
from titan_bridge.errors import BridgeError, about

_PLAN, _DONE, _LOCK = ".reshard.json", "done-{}.jsonl", "lock"
PART = ".part"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True, kw_only=True)
class FileResult:
    """What is known of a finished file."""

    file: str
    crc: int  # CRC-32 of what was written
    counts: Mapping[str, Mapping[str, int]]
    """NaN ("nan") and infinite ("inf") elements, and those that the cast made infinite ("overflow"), by tensor."""


class Staging:
    """The staging directory of one target. `begin` and `publish` are for one process, the rest for all."""

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.abspath(target))
        self.path = self.target.parent / f".{self.target.name}.partial"
        self._old = self.target.parent / f".{self.target.name}.old"
        self._lock: int | None = None

    def check(self, *, overwrite: bool) -> None:
        """Raise BridgeError when the target may not be written; changes nothing."""
        target, parent, wrong = self.target, existing(self.target.parent), None
        if target.is_symlink():
            wrong = "is a symbolic link; give the directory itself"
        elif target.exists() and not target.is_dir():
            wrong = "is a file; give a directory"
        elif target.is_mount():
            wrong = "is a mount point, which cannot be replaced; give a directory in it"
        elif Path.cwd().is_relative_to(target.resolve()):
            wrong = "is where you are, and would be replaced; run from another directory"
        elif target.exists() and any(target.iterdir()) and not overwrite:
            wrong = "is not empty; choose another directory, or --overwrite it"
        elif target.exists() and any(target.iterdir()) and not _replaceable(target):
            wrong = "holds no checkpoint; --overwrite replaces nothing else"
        elif not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
            wrong = f"cannot be made, since {parent} cannot be written to"
        if wrong:
            raise BridgeError(f"{target} {wrong}")

    def begin(self, digest: str, *, resume: bool, fsync: bool = False) -> None:
        """Make the directory, or take over that of a run with the same digest.
        Raises BridgeError: another process is at it; or with `resume`, it belongs to a different run."""
        made = [parent for parent in self.target.parents if not parent.exists()]
        self.target.parent.mkdir(parents=True, exist_ok=True)
        for folder in made if fsync else ():
            sync(folder.parent)
        if (self.target / _PLAN).exists():
            self._take_lock(self.target)
            self._tidy(fsync=fsync)
            self.close()
        plan, new = self.path / _PLAN, self.path / (_PLAN + PART)
        kept = (_LOCK, _PLAN, new.name)
        if not plan.exists() and any(path.name not in kept for path in self.path.glob("*")):
            raise BridgeError(f"{self.path} is in the way and not ours; remove it")
        self._take_lock(self.path)
        self._settle_old()
        content = json.dumps({"digest": digest}).encode() + b"\n"
        if plan.exists():
            if resume and plan.read_bytes() == content:
                return
            if resume:
                raise BridgeError(
                    f"{self.path} was begun with another source, other options or other processes; "
                    "run without --resume to start again"
                )
            for path in self.path.iterdir():
                if path.name not in kept:
                    path.unlink()
        new.write_bytes(content)  # there is a whole plan as long as there is anything else
        new.rename(plan)

    def results(self) -> dict[str, FileResult]:
        """Files that are written down as finished, by any process. Lines that are damaged count as not written."""
        found = {}
        for journal in sorted(self.path.glob(_DONE.format("*"))):
            for line in journal.read_bytes().splitlines():
                crc, _, text = line.partition(b" ")
                if crc == _crc(text):
                    result = FileResult(**json.loads(text))
                    found[result.file] = result
        return found

    def finish(self, result: FileResult, rank: int, *, fsync: bool) -> None:
        """Give a file its name and write it down."""
        part, journal = self.path / (result.file + PART), self.path / _DONE.format(rank)
        if fsync:
            sync(part)
        part.rename(self.path / result.file)
        text = json.dumps(asdict(result)).encode()
        with journal.open("ab") as file:
            file.write(b"\n" + _crc(text) + b" " + text + b"\n")  # the line before may be cut off
        if fsync:
            sync(journal)

    def publish(self, files: Iterable[str], *, overwrite: bool, fsync: bool) -> None:
        """Check that all files are there, give the directory its name, and remove what is ours alone."""
        self.check(overwrite=overwrite)  # hours may have gone by
        missing = [file for file in files if not (self.path / file).is_file()]
        if missing:
            raise BridgeError(f"{self.path}: {missing[0]} is not there; another process removed it?")
        for path in (*self.path.iterdir(), self.path) if fsync else ():
            sync(path)
        if not self.target.exists() or not any(self.target.iterdir()):
            self.path.rename(self.target)
        elif not exchange(self.path, self.target):
            self.target.rename(self._old)
            self.path.rename(self.target)
        self._tidy(fsync=fsync)
        self.close()

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _tidy(self, *, fsync: bool) -> None:
        """Remove what the target has replaced, then our own files in it; the plan last, which says that this is due."""
        if fsync:
            sync(self.target.parent)
        for left in (self.path, self._old):
            if left.exists():
                shutil.rmtree(left)
        for path in (*self.target.glob(_DONE.format("*")), self.target / _LOCK, self.target / _PLAN):
            path.unlink(missing_ok=True)

    def _settle_old(self) -> None:
        """Put back what a run had renamed to .old when it was killed, or remove it where the target is whole."""
        if self._old.exists() and not self.target.exists():
            self._old.rename(self.target)
        elif self._old.exists():
            replaced = f"{self._old} is left from a run that was replacing {self.target}"
            with about(f"{replaced}, which is not whole (remove one of the two)"):
                open_checkpoint(self.target).close()
            shutil.rmtree(self._old)

    def _take_lock(self, directory: Path) -> None:
        path = directory / _LOCK
        while self._lock is None:
            directory.mkdir(exist_ok=True)
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = os.pread(self._lock, 200, 0).decode(errors="replace") or "another process"
                self.close()
                raise BridgeError(f"{who} is writing {self.target} (it holds {path})") from None
            except OSError as error:
                self.close()
                raise BridgeError(
                    f"{path} cannot be locked ({error.strerror}): this disk has no file locks; give a DST on another "
                    "one, or have it mounted with locks"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._lock), path.stat()):
                    break
            self.close()  # whoever held it has published meanwhile: this file is gone, and keeps nobody out
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {platform.node()}".encode(), 0)


def _replaceable(directory: Path) -> bool:
    """Whether a checkpoint lies there, or a LoRA adapter."""
    return is_checkpoint(directory) or (directory / "adapter_config.json").is_file()


def sync(path: Path) -> None:
    """Have a file or directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Two directories change names in one step. Returns False where the system or its disk cannot do that."""
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    if not rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def disk_error(error: OSError, where: Path) -> BridgeError:
    """What the system said while `where` was being written, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return BridgeError(
            f"the disk is full ({error.strerror}) while writing to {where}; nothing was published. "
            "Free some space and run again with --resume, which keeps what is finished"
        )
    return BridgeError(f"{error.filename or where}: {error.strerror}")


def _crc(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
