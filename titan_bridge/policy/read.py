"""Reads a policy from a file (YAML or JSON) or from plain tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from titan_bridge.errors import BridgeError, about
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
        with about(path):
            data = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # JSON is YAML
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
    # As JSON: strict mode refuses a dict for a config class and a list for a tuple, but not from JSON.
    text = json.dumps(data, default=str)
    try:
        return TypeAdapter(Policy).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join([source, *_place(first["loc"], json.loads(text), first["type"] == "missing")])
        if first["type"] == "value_error":
            raise BridgeError(f"{place}: {first['ctx']['error']}") from None
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise BridgeError(f"{place} is unknown; allowed: {ALLOWED}") from None
        raise BridgeError(f"{place} = {first['input']!r}: {first['msg']}") from None


def _place(path: Sequence[int | str], data: Any, missing: bool) -> Iterator[str]:
    """The keys in pydantic's path: it has names of types, too, as of a number or a text where both are allowed.
    `missing`: it ends with a key that is not there."""
    for part in path:
        try:
            data = data[part]
        except (LookupError, TypeError):
            if not missing:
                continue
        yield str(part)


class _Loader(yaml.SafeLoader):
    """YAML in which no mapping has a key twice: the last one would win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        given: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in given:
                line = key.start_mark.line + 1
                raise BridgeError(f"line {line}: {key.value!r:.80} is given twice in one mapping; keep one")
            given.add(key.value)
        return node
