"""Reads a policy from a file (YAML or JSON) or from plain tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from titan_bridge.errors import BridgeError
from titan_bridge.policy.schema import NO_POLICY, Policy, attention_width

ALLOWED = "axes, rules; in a rule match (kind, attention_flavor, prefix_pattern) and plan (tp_size, ep_size, dcp_size)"
KEY = "parallelism_rules"
"""The one key of a policy file."""


def read_policy(path: Path) -> Policy:
    """The policy in a file.

    Raises:
        BridgeError: it cannot be read, or says something that a policy cannot; the file and the key are named.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError) as error:
        raise BridgeError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise BridgeError(f"{path} is not YAML or JSON: {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping) or set(data) != {KEY}:
        found = ", ".join(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise BridgeError(f"{path} has {found or 'nothing'}; a policy file has the one key {KEY}")
    return policy_from(data[KEY], f"{path}: {KEY}")


def policy_of_flags(file: str | None, attention_tp: int | None) -> Policy:
    """What `--policy FILE` or `--attention-tp N` say; no rules where neither is given.

    Raises:
        BridgeError: both are given, or as `read_policy`.
    """
    if file is not None and attention_tp is not None:
        raise BridgeError(
            "--attention-tp is short for a rule; write it into the file of --policy, or leave one out"
        )
    if attention_tp is not None and attention_tp < 1:
        raise BridgeError(f"--attention-tp {attention_tp} is no number of ranks; give at least 1")
    if attention_tp is not None:
        return attention_width(attention_tp)
    return NO_POLICY if file is None else read_policy(Path(file))


def policy_from(data: Any, source: str) -> Policy:
    """The policy that plain tables say; `source` begins every message.

    Raises:
        BridgeError: an unknown key or axis, a wrong value, a rule that is never reached.
    """
    try:
        # As JSON: strict mode refuses a dict for a config class and a list for a tuple, but not from JSON.
        return TypeAdapter(Policy).validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join([source, *(str(part) for part in first["loc"] if not _is_type(part))])
        if first["type"] == "value_error":
            raise BridgeError(f"{place}: {first['ctx']['error']}") from None
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise BridgeError(f"{place} is unknown; allowed: {ALLOWED}") from None
        raise BridgeError(f"{place} = {first['input']!r}: {first['msg']}") from None


def _is_type(part: Any) -> bool:
    """Whether a part of pydantic's path is the name of a type, as for a number or a text, and no key."""
    return isinstance(part, str) and part.startswith(("constrained-", "int", "str", "function-"))
