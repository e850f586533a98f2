"""The checkpoint folder of a training run: what lies in it, which steps are whole, and which one a path means.

OUT/
  checkpoint/             a model folder: everything that serving needs
    titan_bridge.json     the record: family, model config, degrees, resolved config (see `Record`)
    config.json           of Hugging Face's kind, for the model that is trained
    tokenizer.json, ...   as transformers reads them
    step-N/               one checkpoint: DCP, or the Hugging Face export of `checkpoint.last_save_in_hf`

Nothing here imports torch: commands find their model before they import anything slow.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from titan_bridge.errors import BridgeError

CHECKPOINT = "checkpoint"
RECORD = "titan_bridge.json"
METADATA = ".metadata"
"""A DCP is whole once it has this file."""
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
    def directory(self) -> Path:
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
    folder, step = model_and_step(path)
    return TrainedRun(folder=Path(folder), record=Record.read(Path(folder)), step=step)


def model_and_step(path: str | os.PathLike[str], step: int | None = None) -> tuple[str, int | None]:
    """The model folder that a path means, and which step in it.

    A run's output folder means its checkpoint folder; `step-N` means the folder around it with step N. Where weights
    lie in the folder itself, and where there is no step, the step is None.

    Args:
        step: asked for beside the path; else the path's own, else the last whole one.

    Raises:
        BridgeError: the step is not there, is not whole, or is another one than the path's.
    """
    given = Path(path) if Path(path).name else Path(path).absolute()
    folder = given / CHECKPOINT if (given / CHECKPOINT / RECORD).is_file() else given
    named = re.fullmatch(r"step-(\d+)", given.name)
    if named and (given.parent / "config.json").is_file() and not (given / "config.json").is_file():
        folder = given.parent
        if step not in (None, int(named[1])):
            raise BridgeError(f"{given} is one step, and step {step} is asked for; give {folder}")
        step = int(named[1])
    if step is not None:
        step_folder(folder, step)
    elif not any((folder / name).is_file() for name in (METADATA, SINGLE, INDEX)):
        step = max(whole_steps(folder), default=None)
    return os.fspath(path) if folder == given else str(folder), step


def step_folder(folder: Path, step: int) -> Path:
    """The folder of one checkpoint.

    Raises:
        BridgeError: it is not there, or not whole.
    """
    steps = whole_steps(folder)
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise BridgeError(f"{folder} has no whole checkpoint of step {step}; whole ones: {known}")
    return folder / f"step-{step}"


def whole_steps(folder: Path) -> dict[int, Literal["dcp", "hf"]]:
    """The whole checkpoints in a checkpoint folder by their step, in order, with the format of each."""
    found = {step: _format(path) for step, path in sorted(step_folders(folder).items())}
    return {step: form for step, form in found.items() if form is not None}


def step_folders(folder: Path) -> dict[int, Path]:
    """Every `step-N` in a checkpoint folder, whole or not."""
    if not folder.is_dir():
        return {}
    matches = {path: re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir() if path.is_dir()}
    return {int(match[1]): path for path, match in matches.items() if match}


def _format(step: Path) -> Literal["dcp", "hf"] | None:
    """None: it was not written to its end."""
    if (step / METADATA).is_file():
        return "dcp"
    if (step / SINGLE).is_file():
        return "hf"
    try:
        files = set(json.loads((step / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return "hf" if files and all((step / file).is_file() for file in files) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
