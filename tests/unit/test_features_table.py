"""titan_bridge/engine/FEATURES.md is the table that the engine tests run."""

from __future__ import annotations

import ast

from tests.conftest import ROOT
from tests.engine.features import FILE, SAME, table


def test_the_page_is_the_table():
    assert FILE.read_text() == table(), "run `python -m tests.engine.features`"


def test_every_feature_that_works_has_its_test():
    for feature in SAME:
        if not feature.requests:
            file, _, name = feature.test.partition("::")
            tree = ast.parse((ROOT / "tests/engine" / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, feature
