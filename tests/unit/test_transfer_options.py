"""What a user reads of the options of a transfer."""

from __future__ import annotations

import ast

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("transfer/options.py", "Options"),
        ("transfer/options.py", "Report"),
        ("engine/transfer.py", "TitanTrainerInitInfo"),
    ],
)
def test_each_field_is_documented(file, name):
    tree = ast.parse((ROOT / "titan_bridge" / file).read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = []
    for field, after in zip(found.body, [*found.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).startswith("ClassVar"):
            fields.append(ast.unparse(field.target))
            assert isinstance(after, ast.Expr), fields[-1]
            assert isinstance(after.value, ast.Constant), fields[-1]
    assert len(fields) > 5
