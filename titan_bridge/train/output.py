"""What lies where in the output folder of a training run, and how to find a checkpoint in it.

OUT/
  checkpoint/             everything that serving needs; `vllm serve OUT/checkpoint` can read it as a model folder
    titan_bridge.json     the record: family, model config, degrees, resolved config (see `Record`)
    config.json           of Hugging Face's kind, for the model that is trained
    tokenizer.json, ...   as transformers reads them
    step-N/               a checkpoint of torch.distributed.checkpoint; whole once it holds `.metadata`
  documents.json          which text, in which order
  metrics.jsonl           one line for each logged step
  logs/, tb/              a log a rank; TensorBoard
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_bridge.errors import BridgeError

CHECKPOINT = "checkpoint"
DOCUMENTS = "documents.json"
METRICS = "metrics.jsonl"
LOGS = "logs"
RECORD = "titan_bridge.json"
METADATA = ".metadata"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `titan_bridge.json` says. Sizes are global; nothing in it depends on the machine but paths of the data.

    Attributes:
        family: name in `titan_bridge.models`.
        hf_config: config.json of the model.
        expert_bias: whether checkpoints hold TorchTitan's `expert_bias_E`.
        tokenizer: names of the tokenizer files beside the record.
        dtype: of the weights in the checkpoints.
        sizes: degrees of the run: dp, tp, ep, dp_replicate, pp.
        nproc: processes of the run.
        config: the resolved TOML, as plain values.
        origin: where each of its values came from.
        trainer: TorchTitan's resolved config, for the reader; callables as text.
        versions: of titan_bridge, torchtitan and torch.
    """

    family: str
    hf_config: dict[str, Any]
    expert_bias: bool
    tokenizer: tuple[str, ...]
    dtype: str
    sizes: dict[str, int]
    nproc: int
    config: dict[str, Any]
    origin: dict[str, str]
    trainer: dict[str, Any]
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write the record and config.json into a checkpoint folder; a reader sees the old or the new file."""
        values = {"version": VERSION, **vars(self)}
        for name, content in ((RECORD, values), ("config.json", self.hf_config)):
            new = folder / f".{name}.new"
            new.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
            os.replace(new, folder / name)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The record of a checkpoint folder.

        Raises:
            BridgeError: none there, or one of another version.
        """
        file = folder / RECORD
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values.pop("version") != VERSION:
                raise BridgeError(
                    f"{file} has another version than {VERSION}; use the titan_bridge that wrote it"
                )
            values["tokenizer"] = tuple(values["tokenizer"])
            return cls(**values)
        except FileNotFoundError:
            raise BridgeError(
                f"{folder} has no {RECORD}; give the output folder of titan-bridge train"
            ) from None
        except BridgeError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise BridgeError(f"{file} cannot be read as a training record: {error}") from None


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """The checkpoints of one run.

    Attributes:
        folder: the checkpoint folder: config.json and tokenizer files, ready to be a model folder.
        record: of the run.
        step: the checkpoint that was asked for, or the last whole one; None if there is none yet.
    """

    folder: Path
    record: Record
    step: int | None

    @property
    def dcp(self) -> Path:
        """Folder of that checkpoint.

        Raises:
            BridgeError: there is none yet.
        """
        if self.step is None:
            raise BridgeError(f"{self.folder} has no whole checkpoint yet; train on")
        return self.folder / f"step-{self.step}"


def find(path: str | os.PathLike[str]) -> TrainedRun:
    """The run that a path belongs to: the output folder, its checkpoint folder, or one checkpoint in it.

    Raises:
        BridgeError: no record there, or a checkpoint that is not whole.
    """
    given = Path(path)
    step: int | None = None
    if match := re.fullmatch(r"step-(\d+)", given.resolve().name):
        folder, step = given.resolve().parent, int(match[1])
        if step not in whole_steps(folder):
            raise BridgeError(
                f"{given} has no {METADATA}: it was not written to its end; give another checkpoint"
            )
    else:
        folder = given / CHECKPOINT if (given / CHECKPOINT / RECORD).is_file() else given
    record = Record.read(folder)
    steps = whole_steps(folder)
    return TrainedRun(
        folder=folder, record=record, step=step if step is not None else max(steps, default=None)
    )


def model_and_step(path: str) -> tuple[str, int | None]:
    """The model directory that a path means, and the step if the path names one.

    A training run's output folder means its checkpoint folder; `step-N` in that means the same with step N.
    Anything else means itself.
    """
    given = Path(path)
    if (given / CHECKPOINT / RECORD).is_file():
        return str(given / CHECKPOINT), None
    match = re.fullmatch(r"step-(\d+)", given.name)
    if match and (given.parent / RECORD).is_file():
        return str(given.parent), int(match[1])
    return path, None


def whole_steps(folder: Path) -> tuple[int, ...]:
    """Steps of the whole checkpoints in a checkpoint folder, in order."""
    return tuple(sorted(step for step, path in _steps(folder) if (path / METADATA).is_file()))


def remove_partial(folder: Path) -> tuple[int, ...]:
    """Remove the checkpoints that were not written to their end; returns their steps."""
    partial = [(step, path) for step, path in _steps(folder) if not (path / METADATA).is_file()]
    for _, path in partial:
        shutil.rmtree(path, ignore_errors=True)
    return tuple(step for step, _ in partial)


def check_same_run(folder: Path, record: Record) -> None:
    """Refuse to go on from the checkpoints of another model or of other data.

    Raises:
        BridgeError: what differs, as both say it.
    """
    if not whole_steps(folder):
        return
    if not (folder / RECORD).is_file():
        raise BridgeError(
            f"{folder} holds checkpoints without {RECORD}, of which model is unknown; choose another out"
        )
    old = Record.read(folder)
    if old.family != record.family:
        raise BridgeError(
            f"{folder} holds checkpoints of another model: family {old.family} there, {record.family} here; "
            "choose another out"
        )
    # The tokenizer's ids come to the record when it is written; they belong to the data, compared below.
    without_ids = {"bos_token_id": None, "eos_token_id": None}
    different = _differences(old.hf_config | without_ids, record.hf_config | without_ids)
    if different:
        raise BridgeError(f"{folder} holds checkpoints of another model: {different}; choose another out")
    if old.expert_bias != record.expert_bias:
        raise BridgeError(
            f"{folder} holds checkpoints {'with' if old.expert_bias else 'without'} expert_bias_E"
        )
    different = _differences(old.config.get("data") or {}, record.config.get("data") or {})
    if different:
        raise BridgeError(
            f"{folder} holds checkpoints of a run on other data: {different}; choose another out"
        )
    old_ranks, ranks = (r.sizes["dp_replicate"] * r.sizes["dp"] for r in (old, record))
    if old_ranks != ranks:
        raise BridgeError(
            f"{folder} holds checkpoints of a run with dp_replicate * dp = {old_ranks}, and here it is {ranks}; "
            "the data loader's state cannot be divided anew: keep the product, or choose another out"
        )


def _steps(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and path.is_dir():
            found.append((int(match[1]), path))
    return found


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 3) -> str:
    keys = [key for key in sorted({*old, *new}) if _plain(old.get(key)) != _plain(new.get(key))]
    parts = [f"{key} = {old.get(key)!r} there, {new.get(key)!r} here" for key in keys[:limit]]
    return "; ".join(parts) + (f"; and {len(keys) - limit} more" if len(keys) > limit else "")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
