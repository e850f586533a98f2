"""Replace functions of other packages, and say so where one is not what its patch was written for.

`upstream.py` and `processes.py` have the patches; this file has what they share.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Literal

from titan_bridge.errors import BridgeError
from titan_bridge.versions import installed, unsupported

MARK = "_titan_bridge_patch"
"""Attribute on a replaced function: a target that carries it is never wrapped twice."""

When = Literal["start", "build", "specs", "stages"]
"""In which process a patch is in force: each; one that builds TorchTitan's model; one that declares vLLM's specs; one
that builds a pipeline stage of TorchTitan's model. The last kind is looked at where there are stages, only."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One function to replace."""

    target: str
    """`"package.module:Class.function"`."""
    parameters: tuple[str, ...]
    """Names of the parameters that the target must have."""
    function: Callable[..., Any]
    """Called with the original function and then the arguments."""
    when: When

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    def problem(self) -> str | None:
        """Why the target is not what is expected; None if it is. Imports the module."""
        try:
            importlib.import_module(self.module)
            owner, name = self._owner()
            found = vars(owner)[name]  # its own: one that is inherited is another function
            parameters = tuple(inspect.signature(found).parameters)
        except (ImportError, AttributeError, KeyError) as error:
            return f"{self.target} is not there ({error})"
        except (TypeError, ValueError):
            return f"{self.target} is not a function"
        if parameters != self.parameters:
            return f"{self.target} takes ({', '.join(parameters)}), expected ({', '.join(self.parameters)})"
        return None

    def apply(self) -> None:
        """Replace the target, once; one that is not what is expected stays as it is."""
        if self.problem():
            return
        owner, name = self._owner()
        original = vars(owner)[name]
        if getattr(original, MARK, False):
            return

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return self.function(original, *args, **kwargs)

        setattr(patched, MARK, True)
        setattr(owner, name, patched)

    def _owner(self) -> tuple[Any, str]:
        *outer, name = self.target.partition(":")[2].split(".")
        return functools.reduce(getattr, outer, sys.modules[self.module]), name


PATCHES: list[Patch] = []
"""All patches."""


def patch(target: str, *parameters: str, when: When = "start") -> Callable[[Callable[..., Any]], Any]:
    """Enter the decorated function in `PATCHES`: it gets the original function, then the arguments."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        PATCHES.append(Patch(target=target, parameters=parameters, function=function, when=when))
        return function

    return enter


def apply(when: When) -> None:
    """Apply the patches of one kind; where a module is not imported yet, once somebody imports it."""
    for one in PATCHES:
        if one.when == when:
            after_import(one.module, one.apply)


def problems(*, stages: bool = False) -> dict[str, str]:
    """Targets that are not what their patches expect, and why, whether or not a patch is in force here.

    `stages`: those that pipeline stages need, instead of all others; importing them takes seconds.
    """
    looked_at = [one for one in PATCHES if (one.when == "stages") == stages]
    return {one.target: text for one in looked_at if (text := one.problem())}


def refusal(found: Mapping[str, str]) -> BridgeError:
    """The error that names what was found; the keys begin with the name of a package."""
    packages = sorted({target.split(".")[0] for target in found})
    versions = ", ".join(f"{name} {installed(name)}" for name in packages)
    advice = unsupported() or "install versions that `titan-bridge doctor` accepts"
    return BridgeError(f"titan_bridge does not know this {versions}: {'; '.join(found.values())}; {advice}")


def after_import(name: str, then: Callable[[], Any]) -> None:
    """Call `then` once the module `name` was imported by whoever needs it; at once if it was already."""
    if name in sys.modules:
        then()
        return
    if _imports not in sys.meta_path:
        sys.meta_path.insert(0, _imports)
    waiting = _imports.waiting.setdefault(name, [])
    if then not in waiting:
        waiting.append(then)


class _Imports(importlib.abc.MetaPathFinder):
    """Sees modules being imported. One that is only looked for (`importlib.util.find_spec`) stays waited for."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[], Any]]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            for then in self.waiting.pop(fullname, []):
                with contextlib.suppress(Exception):  # the import of somebody who may not want us
                    then()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


_imports = _Imports()
