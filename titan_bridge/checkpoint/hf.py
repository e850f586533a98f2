"""Hugging Face checkpoints: config.json and one safetensors file, or several with an index."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.files import inside
from titan_bridge.checkpoint.safetensors import read_header
from titan_bridge.errors import BridgeError
from titan_bridge.json_file import read_json_object
from titan_bridge.run_folder import INDEX, SINGLE
from titan_bridge.sharding.tensors import TensorMetadata

_NUMBERED = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
CARRIED = (  # patterns of small files that go with the weights wherever they go
    *(
        "generation_config.json",
        "preprocessor_config.json",
        "chat_template*",
        "tokenizer*.json",
        "tokenizer*.model",
    ),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
)


def is_hf(directory: Path) -> bool:
    """Whether the directory has safetensors weights under Hugging Face's names."""
    return (directory / SINGLE).is_file() or (directory / INDEX).is_file() or bool(_numbered(directory))


def open_hf(directory: Path) -> Checkpoint:
    """Open a directory with `model.safetensors`, or with the files that `model.safetensors.index.json` names.
    Without an index, all of `model-00001-of-0000N.safetensors` to the Nth.
    Raises BridgeError: what is missing, unreadable, contradictory or outside the directory."""
    index = directory / INDEX
    stored: dict[str, TensorMetadata] = {}
    if (directory / SINGLE).is_file():
        files = {directory / SINGLE: None}
    elif not index.is_file():
        files = dict.fromkeys(_all_numbered(directory))
    else:
        wanted: dict[Path, set[str]] = {}
        named = read_json_object(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise BridgeError(f"{index} has no weight_map; it must name the file of each tensor")
        for name, file in named.items():
            wanted.setdefault(inside(directory, file, str(index)), set()).add(name)
        files = dict(sorted(wanted.items()))
    for path, names in files.items():
        entries, _ = read_header(path)
        if names is not None and names != entries.keys():
            missing, extra = sorted(names - entries.keys()), sorted(entries.keys() - names)
            what = [f"{missing[0]} is not in it"] if missing else []
            what += [f"{extra[0]} is in it but not in the index"] if extra else []
            raise BridgeError(f"{path} and {INDEX} disagree: {'; '.join(what)}")
        for entry in entries.values():
            if entry.name in stored:
                first = stored[entry.name].chunks[0].path.name
                raise BridgeError(f"{entry.name} is in {first} and in {path.name}")
            stored[entry.name] = entry
    return Checkpoint(path=directory, format="hf", tensors=stored, config=read_config(directory))


def read_config(directory: Path) -> dict[str, Any] | None:
    """Parsed config.json, or None where there is none. Raises BridgeError for one that is not a JSON object."""
    path = directory / "config.json"
    return read_json_object(path) if path.is_file() else None


def carried_files(directory: Path) -> list[Path]:
    """The tokenizer and generation files of a directory."""
    found = {path for pattern in CARRIED for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name != INDEX)


def _numbered(directory: Path) -> dict[Path, tuple[int, int]]:
    """Files that say which one of how many they are."""
    matches = {path: _NUMBERED.fullmatch(path.name) for path in sorted(directory.glob("model-*.safetensors"))}
    return {path: (int(match[1]), int(match[2])) for path, match in matches.items() if match}


def _all_numbered(directory: Path) -> list[Path]:
    found = _numbered(directory)
    counts = {count for _, count in found.values()}
    if len(counts) > 1:
        raise BridgeError(f"{directory} has files of {sorted(counts)} parts and no {INDEX}: which are meant?")
    missing = set(range(1, max(counts) + 1)) - {number for number, _ in found.values()}
    if missing:
        raise BridgeError(f"{directory} lacks part {min(missing)} of {max(counts)}, and {INDEX}; copy it too")
    return list(found)
