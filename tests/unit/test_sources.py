"""What holds for the sources: a family's name stands in its own files, and engine/ imports without circles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.conftest import ROOT

PACKAGE = ROOT / "titan_bridge"
NAMED = re.compile(r"deepseek|gpt_?oss|llama|qwen", re.IGNORECASE)
OWN = re.compile(r"models/(deepseek|gpt_oss|llama3|qwen3)\w*\.py")
ALLOWED = {
    "engine/cpu/packed_experts.py": "experts that vLLM's operator for CPUs computes",
    "engine/patches/upstream.py": "a field of vLLM's config",
    "models/rope.py": "kinds of rope scaling",
    "models/registry.py": "what is refused by name",
    "testing.py": "small checkpoints of each family",
}
"""Files beside those of families whose code names one, and what for."""


def sources() -> Iterator[tuple[str, ast.Module, str]]:
    """Path below the package, syntax tree and text of every file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        yield str(path.relative_to(PACKAGE)), ast.parse(text), text


def names(tree: ast.Module) -> Iterator[str]:
    """Identifiers, imported modules, and strings of one word."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute, ast.keyword)):
            yield str(node.id if isinstance(node, ast.Name) else getattr(node, "attr", None) or node.arg)  # type: ignore[attr-defined]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.name for alias in node.names)
            yield getattr(node, "module", None) or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value


def test_a_family_is_named_in_its_own_files_only() -> None:
    """So that a new one adds files and edits none."""
    found = {
        name for name, tree, _ in sources() if not OWN.fullmatch(name) and any(map(NAMED.search, names(tree)))
    }
    assert found == set(ALLOWED)


def test_all_that_the_families_here_use_is_there_for_others() -> None:
    """What a family's file takes from the rest of the package are names without an underscore."""
    private = [
        (name, node.module, alias.name)
        for name, tree, _ in sources()
        if OWN.fullmatch(name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("titan_bridge")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert private == []


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """Modules out of `known` that a file imports, at the top or inside of a function, but not for types alone."""
    for_types = {
        id(below)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for below in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & known


def test_no_file_of_engine_imports_itself_in_a_circle() -> None:
    trees = {
        "titan_bridge." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): tree
        for name, tree, _ in sources()
        if name.startswith("engine/")
    }
    left = {name: imports(tree, set(trees)) - {name} for name, tree in trees.items()}
    while ready := [name for name, wants in left.items() if not wants & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"in circles, or above some: {sorted(left)}"
