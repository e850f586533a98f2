"""Waiting for imports, with modules of this test's own."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from titan_bridge.engine.patches import apply


def test_everybody_who_waits_for_a_module_is_called_once_when_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "waited_for.py").write_text("value = 1\n")
    seen: list[str] = []

    def first() -> None:
        seen.append(f"first {sys.modules['waited_for'].value}")

    def second() -> None:
        seen.append("second")
        raise RuntimeError("whoever imports the module has not asked for us")

    for then in (first, second, first):
        apply.after_import("waited_for", then)
    assert importlib.util.find_spec("waited_for") is not None  # looking for it is not importing it
    assert seen == []
    assert importlib.import_module("waited_for").value == 1
    assert seen == ["first 1", "second"]
    apply.after_import("waited_for", first)
    assert seen == ["first 1", "second", "first 1"]
    del sys.modules["waited_for"]


def test_a_target_is_replaced_once_and_only_if_it_is_what_is_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_others.py").write_text(
        "class Thing:\n"
        "    def add(self, a, b=1):\n        return a + b\n"
        "    number = 3\n"
        "def plain():\n    return 1\n"
    )

    def patch(name: str, *parameters: str) -> apply.Patch:
        return apply.Patch(
            target=f"of_others:{name}",
            parameters=parameters,
            function=lambda original, *args, **kwargs: 10 * original(*args, **kwargs),
            when="start",
        )

    for wrong, why in (
        (patch("Thing.add", "self", "a"), "of_others:Thing.add takes (self, a, b), expected (self, a)"),
        (patch("Thing.number"), "of_others:Thing.number is not a function"),
        (patch("Thing.subtract", "self"), "of_others:Thing.subtract is not there"),
        (patch("Other.add", "self"), "of_others:Other.add is not there"),
    ):
        wrong.apply()
        assert (wrong.problem() or "").startswith(why)
    thing = importlib.import_module("of_others").Thing()
    assert thing.add(2) == 3
    for right in (patch("Thing.add", "self", "a", "b"), patch("plain")):
        right.apply()
        right.apply()
        assert right.problem() is None
    assert (thing.add(2), thing.add(a=2, b=5), sys.modules["of_others"].plain()) == (30, 70, 10)
    del sys.modules["of_others"]
