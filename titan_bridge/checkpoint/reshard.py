"""From any checkpoint to any other: decide everything, check everything, then stream.

`prepare` reads headers and configs and returns a `Job`; nothing is written, and whatever is wrong is said here.
`Job.run` writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from titan_bridge.checkpoint import hf
from titan_bridge.checkpoint.adapter import merged
from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.dcp import is_dcp
from titan_bridge.checkpoint.job import Job, Options, Outcome
from titan_bridge.checkpoint.mapping import TensorMap, make_mapping, same_names
from titan_bridge.checkpoint.model_dir import weights_directory
from titan_bridge.checkpoint.open import open_checkpoint, refuse_remote, under_hf_names
from titan_bridge.checkpoint.quantized import ComputedCheckpoint, dequantized, without_quantization
from titan_bridge.checkpoint.staging import Staging
from titan_bridge.checkpoint.target import Target, dcp_target, hf_target
from titan_bridge.checkpoint.team import Team
from titan_bridge.errors import BridgeError
from titan_bridge.json_file import read_json_object
from titan_bridge.models import families
from titan_bridge.sharding.plan import plan

__all__ = ["Job", "Options", "Outcome", "prepare"]


def prepare(options: Options, team: Team | None = None) -> Job:
    """Read headers and configs, check everything that can be checked, and plan.
    Raises BridgeError: the first thing that is wrong; all tensors that do not fit the model are in one line."""
    team = team or Team()
    refuse_remote(options.source)
    refuse_remote(options.target)
    # The output folder of a training run, and its checkpoint folder, stand for the last whole step.
    found = weights_directory(str(options.source)) or options.source
    if options.workers < 1:
        raise BridgeError(f"--workers {options.workers}; give at least 1")
    if options.max_shard_size < 1:
        raise BridgeError(f"--max-shard-size {options.max_shard_size}; give at least 1 byte")
    check_paths(found, options.target, overwrite=options.overwrite)
    extra = options.with_optimizer
    if options.names is not None and extra:
        raise BridgeError("--names and --with-optimizer do not go together; give one of them")
    source = open_checkpoint(found, extra=extra, names=options.names)
    config, small = _config(options, source)
    if source.format == "hf" and not isinstance(source, ComputedCheckpoint):
        # Its own config.json said nothing of quantized weights; the one that is in use may.
        source = dequantized(
            source, config, f"--config {options.config}" if options.config else "config.json"
        )
    for flag, given in (("--dtype", options.dtype), ("--merge-lora", options.merge_lora)):
        if given is not None:
            _check_not_quantized(flag, source)
    if options.merge_lora is not None:
        source = merged(source, options.merge_lora)
    if extra and not (source.format == options.to == "dcp" and is_dcp(source.path)):
        given = f"{source.format} to {options.to}"
        raise BridgeError(f"--with-optimizer carries optimizer state from DCP to DCP only; this is {given}")
    config = config and without_quantization(config)
    source = under_hf_names(source, config)
    if source.format == options.to:
        tensors = same_names(source, options.dtype)
    elif config is None:
        raise BridgeError(
            f"{source.path} has no config.json, which names the model; give one with --config "
            "(a directory with config.json, or the file)"
        )
    else:
        tensors = make_mapping(source, config, options.dtype)
    if extra:
        others = [replace(stored, chunks=()) for stored in source.extra_tensors.values()]
        tensors = replace(tensors, tensors=(*tensors.tensors, *others))
    target = _target(options, tensors, source, team)
    made = plan(source.entries.values(), target.tensors(), tensors.views, allow_missing=True)
    for name, count in made.missing.items():
        if name not in tensors.zero:
            raise BridgeError(f"{name}: {count} elements are in no tensor of {source.path}")
    return Job(
        options=options,
        source=source,
        tensors=tensors,
        target=target,
        plan=made,
        hf=config,
        carried=small,
        team=team,
    )


def _check_not_quantized(flag: str, source: Checkpoint) -> None:
    """Raise BridgeError for quantized weights: the numbers would be taken for values, without their scales."""
    signs = [f"{s.name} ({s.dtype})" for s in source.tensors.values() if "float8" in str(s.dtype)]
    signs += [name for name in source.tensors if name.endswith(("_scale_inv", "weight_scale", "input_scale"))]
    if signs:
        raise BridgeError(
            f"{flag}: {source.path} has {signs[0]}, and no config.json says how its weights are quantized: give one "
            f"with --config, or leave {flag} out to carry them as they are"
        )


def check_paths(found: Path, destination: Path, *, overwrite: bool) -> None:
    """Raise BridgeError where the source would be replaced, or the destination may not be written."""
    source, target = found.resolve(), destination.resolve()
    if source == target:
        raise BridgeError(f"SRC and DST are both {source}; give another directory for DST")
    if source.is_relative_to(target):
        raise BridgeError(f"SRC lies inside DST ({target}), which is replaced; give another DST")
    Staging(destination).check(overwrite=overwrite)


def _config(options: Options, source: Checkpoint) -> tuple[Mapping[str, Any] | None, tuple[Path, ...]]:
    """config.json and the small files beside it."""
    if options.config is None:
        run = source.path.parent
        is_step = source.format == "dcp" or source.path.name.startswith("step-")
        if is_step and source.config is None and (run / "config.json").is_file():
            return hf.read_config(run), tuple(hf.carried_files(run))  # a step of a training run
        return source.config, tuple(hf.carried_files(source.path))
    given = options.config
    small = hf.carried_files(source.path) or (hf.carried_files(given) if given.is_dir() else [])
    return stated_config(given), tuple(small)


def stated_config(given: Path) -> Mapping[str, Any]:
    """config.json that `--config` names: a directory with it, the file, or FAMILY:FLAVOR.
    Raises BridgeError: there is none."""
    if not given.exists():
        if flavor := re.fullmatch(r"(\w+):([\w.-]+)", str(given)):
            return _flavor(*flavor.groups())
        raise BridgeError(
            f"--config {given} does not exist; give a directory with config.json, the file, or one of TorchTitan's "
            "models as FAMILY:FLAVOR, for example qwen3:0.6B"
        )
    config = read_json_object(given) if given.is_file() else hf.read_config(given)
    if config is None:
        raise BridgeError(f"--config {given} has no config.json")
    return config


def _flavor(name: str, flavor: str) -> Mapping[str, Any]:
    """config.json for one of the models of a family that have a name."""
    known = {family.name: family for family in families()}
    if name not in known:
        raise BridgeError(f"--config {name}:{flavor}: no family {name!r}; allowed: {', '.join(known)}")
    flavors = known[name].flavors()
    if flavor not in flavors:
        allowed = ", ".join(flavors) or "none"
        raise BridgeError(f"--config {name}:{flavor}: there is no such flavor; allowed: {allowed}")
    return known[name].hf_config(known[name].model_spec(flavor).model)


def _target(options: Options, tensors: TensorMap, source: Checkpoint, team: Team) -> Target:
    most = options.max_shard_size
    if team.size > 1:  # a file belongs to one process, so there must be one for each at least
        most = min(most, math.ceil(sum(tensor.nbytes for tensor in tensors.tensors) / team.size))
    if options.to == "hf":
        return hf_target(tensors.tensors, most)
    return dcp_target(tensors.tensors, most, tensors.aliases, source.blobs)
