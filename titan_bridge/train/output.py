"""The output folder of a training run, and whether another run may go on in it.

OUT/
  checkpoint/             see `titan_bridge.run_folder`
  documents.json          which text, in which order
  metrics.jsonl           one line for each logged step
  logs/, tb/              a log a rank; TensorBoard
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_bridge.errors import BridgeError
from titan_bridge.run_folder import RECORD, Record, step_folders, whole_steps

DOCUMENTS = "documents.json"
METRICS = "metrics.jsonl"
LOGS = "logs"


def remove_partial(folder: Path) -> tuple[int, ...]:
    """Remove the checkpoints that were not written to their end; returns their steps."""
    whole = whole_steps(folder)
    partial = {step: path for step, path in step_folders(folder).items() if step not in whole}
    for path in partial.values():
        shutil.rmtree(path, ignore_errors=True)
    return tuple(sorted(partial))


def set_aside(folder: Path, begin: int) -> dict[int, str]:
    """Rename the checkpoints after step `begin`, which TorchTitan would write into and take for its own; new names by
    step. "step-" is in none of them, since TorchTitan finds its checkpoints by that anywhere in a name."""
    names: dict[int, str] = {}
    for step, path in sorted(step_folders(folder).items()):
        if step > begin:
            tries = (f"replaced-{step}{more}" for more in ("", *(f"-{number}" for number in range(2, 1000))))
            names[step] = next(name for name in tries if not (folder / name).exists())
            path.rename(folder / names[step])
    return names


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


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 3) -> str:
    keys = [key for key in sorted({*old, *new}) if _plain(old.get(key)) != _plain(new.get(key))]
    parts = [f"{key} = {old.get(key)!r} there, {new.get(key)!r} here" for key in keys[:limit]]
    return "; ".join(parts) + (f"; and {len(keys) - limit} more" if len(keys) > limit else "")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
