"""Local text for TorchTitan's data loader: which files, cut into documents, read when they are needed.

The list of documents is a file in the output folder, so that every rank and every later run sees the same text
in the same order; the text itself stays where it is.
"""

from __future__ import annotations

import json
import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
from torchtitan.hf_datasets import DatasetConfig, text_datasets

from titan_bridge.config.train_schema import Data
from titan_bridge.errors import BridgeError

NAME = "titan_bridge_text"
"""What our dataset is called in TorchTitan's table of text datasets."""

PIECES_PER_RANK = 4
"""Documents that each data rank shall have at least; a short text is cut into smaller ones."""

_SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "test", "tests", "idlelib", "lib2to3"})


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents in training order: (file, first byte, byte after the last one)."""

    pieces: tuple[tuple[str, int, int], ...]

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(stop - start for _, start, stop in self.pieces)

    def write(self, file: Path) -> None:
        file.write_text(json.dumps({"version": 1, "pieces": self.pieces}), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Documents:
        pieces = json.loads(file.read_text(encoding="utf-8"))["pieces"]
        return cls(pieces=tuple((path, start, stop) for path, start, stop in pieces))

    def missing(self) -> str | None:
        """A file that is gone or shorter than it was, or None."""
        ends: dict[str, int] = {}
        for path, _, stop in self.pieces:
            ends[path] = max(stop, ends.get(path, 0))
        return next((p for p, end in ends.items() if not os.path.isfile(p) or os.path.getsize(p) < end), None)


def find_documents(data: Data, *, ranks: int) -> Documents:
    """All text of `data`, in an order that its seed decides.

    Args:
        ranks: data ranks that share the documents; each gets at least one.

    Raises:
        BridgeError: a path that does not exist or holds no text, or too little text for the ranks.
    """
    files: dict[str, int] = {}
    for given in data.path:
        found = {str(file): file.stat().st_size for file in _files(given, data.pattern) if _is_text(file)}
        if not sum(found.values()):
            what = f"no text in files named {data.pattern}" if os.path.isdir(given) else "no text"
            raise BridgeError(
                f"data.path = {given!r} holds {what}; give a UTF-8 text file, a folder of them, or stdlib"
            )
        files |= found
    total = sum(files.values())
    largest = max(64, min(data.longest, total // (PIECES_PER_RANK * ranks)))
    pieces = [piece for file, size in files.items() for piece in _cut(file, size, largest)]
    if len(pieces) < ranks:
        raise BridgeError(
            f"data.path = {', '.join(data.path)} holds {total} bytes of text, too little for {ranks} data ranks; "
            "give more text or a smaller dp_replicate * dp"
        )
    random.Random(data.seed).shuffle(pieces)
    return Documents(pieces=tuple(pieces))


def register() -> None:
    """Enter the dataset in TorchTitan's table; its path is a file that `Documents.write` wrote."""
    text_datasets.DATASETS[NAME] = DatasetConfig(path="", loader=_load, sample_processor=read_piece)


def read_piece(piece: dict[str, object]) -> str:
    """The text of one document: a row {"path", "start", "stop"} of the dataset."""
    with open(str(piece["path"]), "rb") as file:
        file.seek(int(str(piece["start"])))
        return file.read(int(str(piece["stop"])) - int(str(piece["start"]))).decode("utf-8", errors="replace")


def texts(documents: Documents, limit: int) -> Iterator[str]:
    """Documents until about `limit` bytes were given."""
    for path, start, stop in documents.pieces:
        if limit <= 0:
            return
        yield read_piece({"path": path, "start": start, "stop": stop})
        limit -= stop - start


def _load(path: str) -> datasets.Dataset:
    pieces = Documents.read(Path(path)).pieces
    columns = zip(*pieces, strict=True)
    return datasets.Dataset.from_dict(dict(zip(("path", "start", "stop"), map(list, columns), strict=True)))


def _files(given: str, pattern: str) -> list[Path]:
    if given == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return [
            file for file in _walk(root, "*.py") if not _SKIPPED_FOLDERS & set(file.relative_to(root).parts)
        ]
    path = Path(given).expanduser().absolute()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _walk(path, pattern)
    raise BridgeError(f"data.path = {given!r} does not exist; give a text file, a folder of them, or stdlib")


def _walk(root: Path, pattern: str) -> list[Path]:
    """Files below `root` by name, sorted; hidden ones left out."""
    try:
        found = list(root.rglob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise BridgeError(f"data.pattern = {pattern!r} is no name of files below a folder: {error}") from None
    return sorted(
        file
        for file in found
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )


@lru_cache(maxsize=1)
def _text_bytes() -> bytes:
    return bytes(set(range(32, 256)) | {7, 8, 9, 10, 12, 13, 27})


def _is_text(file: Path) -> bool:
    """Whether the file's beginning is UTF-8 without control characters."""
    try:
        with file.open("rb") as opened:
            head = opened.read(8192)
    except OSError as error:
        raise BridgeError(f"data.path: {file} cannot be read: {error.strerror}") from None
    if head.translate(None, _text_bytes()):
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # a character cut by the end of what was read
    return True


def _cut(file: str, size: int, largest: int) -> Iterator[tuple[str, int, int]]:
    """Pieces of `largest` bytes and the rest of the line, which is cut where it is as long again."""
    if size <= largest:
        if size:
            yield file, 0, size
        return
    start = 0
    with open(file, "rb") as opened:
        while start < size:
            stop = min(size, start + largest)
            if stop < size:
                opened.seek(stop)
                line = opened.readline(largest)
                # Cut where the line is as long again: not inside a character of UTF-8.
                more = b"" if line.endswith(b"\n") else opened.read(3)
                inside = next((n for n, byte in enumerate(more) if byte & 0xC0 != 0x80), len(more))
                stop = min(size, stop + len(line) + inside)
            yield file, start, stop
            start = stop
