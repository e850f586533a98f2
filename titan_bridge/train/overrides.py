"""Set fields of a TorchTitan config tree by dotted path, with the checks that its dataclasses do not make.

A path goes through dataclass fields, list indices and dict keys: `optimizer.param_groups.0.optimizer_kwargs.lr`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC

from titan_bridge.config.reader import walk
from titan_bridge.errors import BridgeError, did_you_mean

CHOICES: dict[str, dict[str, Any]] = {
    "activation_checkpoint": {
        "none": lambda: None,
        "selective": SelectiveAC.Config,
        "full": FullAC.Config,
        "memory_budget": MemoryBudgetAC.Config,
    },
}
"""Fields whose value is one of several classes, by path: the word that a TOML file says -> what makes it."""

AT_LEAST: dict[str, float] = {
    "training.steps": 1,
    "training.local_batch_size": 1,
    "training.seq_len": 1,
    "training.gc_freq": 1,
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 0,
    "checkpoint.load_step": -1,
    "metrics.log_freq": 1,
    "lr_scheduler.warmup_steps": 0,
    "lr_scheduler.total_steps": 1,
    "lr_scheduler.min_lr_factor": 0,
    "lr_scheduler.decay_ratio": 0,
    "comm.init_timeout_seconds": 1,
    "comm.train_timeout_seconds": 1,
    "comm.trace_buf_size": 0,
    "dataloader.num_workers": 0,
    "debug.seed": 0,
    "parallelism.pipeline_parallel_degree": 1,
    "parallelism.context_parallel_degree": 1,
    "parallelism.pipeline_parallel_microbatch_size": 1,
    "validator.freq": 1,
    "profiler.profile_freq": 1,
}
AT_MOST: dict[str, float] = {"lr_scheduler.min_lr_factor": 1, "lr_scheduler.decay_ratio": 1}
"""Bounds of numbers that TorchTitan's types leave open."""

ABOVE_ZERO = frozenset({"training.max_norm"})


def apply(config: Any, values: Mapping[str, Any], source: Mapping[str, str], *, prefix: str = "") -> None:
    """Set every leaf of `values` in the tree `config`, in place, and run the checks of each class that changed.

    Args:
        config: a TorchTitan `Trainer.Config` (or a part of one).
        values: nested as the tree is.
        source: dotted path -> what said so ("configs/train/x.toml" or "--set"), for the messages.
        prefix: path of `config` in `source` and in messages, with a trailing dot, for instance "trainer.".

    Raises:
        BridgeError: an unknown key with the nearest known one, a wrong type, or a value out of range.
    """
    _descend(config, values, source, prefix, "")
    for path, part in parts(config):
        check = getattr(part, "__post_init__", None)
        if check is None or not _touched(values, path):
            continue
        try:
            check()
        except BridgeError:
            raise
        except ValueError as error:
            key = prefix + path
            place = next(
                (where for name, where in source.items() if name.startswith(key)), "the configuration"
            )
            raise BridgeError(f"{place}: [{key.rstrip('.') or 'trainer'}]: {error}") from None


def parts(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dataclass of a config tree with its dotted path, innermost first; the model's own tree left out."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "model_spec" or field.name.startswith("_"):
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from parts(value, f"{path}{field.name}.")
    yield path.rstrip("."), config


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, plain value) of everything that a TOML file could set, in the order of the classes."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        for field in dataclasses.fields(config):
            if field.name != "model_spec" and not field.name.startswith("_"):
                yield from leaves(getattr(config, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(config, list) and config and dataclasses.is_dataclass(config[0]):
        for index, item in enumerate(config):
            yield from leaves(item, f"{path}.{index}")
    elif isinstance(config, dict) and config:
        for key, value in config.items():
            yield from leaves(value, f"{path}.{key}")
    else:
        yield path, config


def _touched(values: Mapping[str, Any], path: str) -> bool:
    return not path or any(name.startswith(f"{path}.") for name, _ in walk(values))


def _descend(node: Any, values: Mapping[str, Any], source: Mapping[str, str], prefix: str, path: str) -> None:
    for key, value in values.items():
        here = f"{path}.{key}" if path else key
        full = prefix + here
        place = _place(source, full)
        known = _keys(node)
        if known is None:
            shown = "none" if node is None else repr(node)
            raise BridgeError(f"{place}: {full}: {prefix}{path} is {shown}; nothing below it can be set")
        if key not in known:
            parent = f"{prefix}{path}." if path else prefix
            guess = did_you_mean(key, known, parent)
            table = f"[{parent[:-1]}]" if parent else "the top level"
            raise BridgeError(
                f"{place}: unknown key {full}; {guess}allowed in {table}: {', '.join(sorted(known)) or 'nothing'}"
            )
        current = _get(node, key)
        if isinstance(value, Mapping) and _keys(current) is not None:
            _descend(current, value, source, prefix, here)
        elif isinstance(value, Mapping) and value and current is None and not _takes_table(node, key):
            raise BridgeError(f"{place}: {full} is none; nothing below it can be set")
        else:
            _set(node, key, _checked(node, key, value, here, full, place))


def _place(source: Mapping[str, str], full: str) -> str:
    if full in source:
        return source[full]
    return next((where for name, where in source.items() if name.startswith(f"{full}.")), "the configuration")


def _keys(node: Any) -> list[str] | None:
    """What can follow in a path; None for a value."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [field.name for field in dataclasses.fields(node) if not field.name.startswith("_")]
    if isinstance(node, list) and node and dataclasses.is_dataclass(node[0]):
        return [str(index) for index in range(len(node))]
    if isinstance(node, dict) and node:
        return [str(key) for key in node]
    return None


def _get(node: Any, key: str) -> Any:
    if isinstance(node, list):
        return node[int(key)]
    return node[key] if isinstance(node, dict) else getattr(node, key)


def _set(node: Any, key: str, value: Any) -> None:
    if isinstance(node, list):
        node[int(key)] = value
    elif isinstance(node, dict):
        node[key] = value
    else:
        setattr(node, key, value)


def _hint(node: Any, key: str) -> Any:
    """Declared type of a field; for a dict's entry the type of the value that it replaces."""
    if isinstance(node, dict):
        return type(node[key])
    if isinstance(node, list):
        return type(node[int(key)])
    return typing.get_type_hints(type(node)).get(key, Any)


def _takes_table(node: Any, key: str) -> bool:
    hint = _hint(node, key)
    return any(typing.get_origin(part) is dict or part is dict for part in _alternatives(hint))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.get_args(hint)
    return (hint,)


def _checked(node: Any, key: str, value: Any, path: str, full: str, place: str) -> Any:
    """`value` as the field's type, or a refusal."""
    if path in CHOICES:
        if not isinstance(value, str) or value not in CHOICES[path]:
            raise _refusal(place, full, value, f"one of {', '.join(CHOICES[path])}")
        return CHOICES[path][value]()
    if _keys(_get(node, key)) is not None and not isinstance(value, (Mapping, list)):
        raise _refusal(place, full, value, "a table")
    try:
        # As JSON, as for our own keys: a list may become a tuple and an int a float, nothing else is converted.
        adapter = TypeAdapter(_hint(node, key), config=ConfigDict(strict=True))
        checked = adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(_wanted(item) for item in error.errors(include_url=False)))
        raise _refusal(place, full, value, wanted) from None
    except Exception as error:  # pydantic has no schema for callables and classes
        raise BridgeError(
            f"{place}: {full} cannot be set from TOML; set it in a model.config function"
        ) from error
    _check_range(path, checked, full, place)
    return checked


def _wanted(item: Any) -> str:
    words = {
        "string_type": "a string",
        "int_type": "an integer",
        "int_from_float": "an integer",
        "float_type": "a number",
        "bool_type": "true or false",
        "list_type": "a list",
        "tuple_type": "a list",
        "dict_type": "a table",
        "none_required": "left out",
    }
    return words.get(item["type"]) or item["msg"].removeprefix("Input should be ")


def _check_range(path: str, value: Any, full: str, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value) and (path != "training.max_norm" or math.isnan(value)):  # inf: no clipping
        raise _refusal(place, full, value, "a finite number")
    low, high = AT_LEAST.get(path), AT_MOST.get(path)
    if low is not None and value < low:
        raise _refusal(place, full, value, f"at least {low}")
    if high is not None and value > high:
        raise _refusal(place, full, value, f"at most {high}")
    name = path.rsplit(".", 1)[-1]
    if (path in ABOVE_ZERO or (name == "lr" and path.startswith("optimizer."))) and value <= 0:
        raise _refusal(place, full, value, "greater than 0")
    if path == "training.global_batch_size" and value != -1 and value < 1:
        raise _refusal(place, full, value, "-1 (one accumulation step) or at least 1")


def _refusal(place: str, full: str, value: Any, wanted: str) -> BridgeError:
    return BridgeError(
        f"{place}: {full} = {value!r} ({type(value).__name__}) is not allowed; it must be {wanted}"
    )
