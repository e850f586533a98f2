"""`titan-bridge reshard`: one checkpoint into another format, dtype or layout, in one pass."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from titan_bridge.cli import imports
from titan_bridge.commands.progress import Bars
from titan_bridge.errors import BridgeError

if TYPE_CHECKING:
    from titan_bridge.checkpoint.job import Job, Outcome

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_OF_AN_ADAPTER = {"src", "dst", "to", "config", "lora_alpha", "dry_run", "overwrite", "json"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reshard:
    """Convert a checkpoint: Hugging Face safetensors into TorchTitan's DCP, or back.

    Streams in one pass with flat memory. DST appears when it is complete, and not before; a run that was killed
    goes on with --resume. Under torchrun the files are shared out over the processes.

    Example: titan-bridge reshard out/demo/qwen3_moe_ep2 out/qwen3_moe_hf --to hf
    """

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Directory with a checkpoint in either format."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Directory to be made."""
    to: Literal["hf", "dcp", "peft"]
    """Format of DST: hf (loads in transformers and vLLM), dcp (loads in TorchTitan at any layout), peft (the LoRA
    adapter that TorchTitan trained in SRC; with --to dcp, SRC may be such a folder)."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Where SRC has no config.json: a directory with one (and the tokenizer), the file itself, or one of TorchTitan's
    models as FAMILY:FLAVOR, for example qwen3:0.6B."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16,float16}", help_behavior_hint=""),
    ] = None
    """Of the weights; else they keep their own."""
    names: Annotated[str | None, tyro.conf.arg(metavar="PATTERN", help_behavior_hint="")] = None
    """Where another program wrote SRC: how it calls the tensor NAME, with {} in place of NAME, for example
    'state.model.{}'. Names are TorchTitan's or Hugging Face's behind it; tensors that do not fit are left out."""
    merge_lora: Annotated[Path | None, tyro.conf.arg(metavar="ADAPTER", help_behavior_hint="")] = None
    """A folder with a LoRA adapter in PEFT's format, which is added to SRC's weights (Hugging Face)."""
    lora_alpha: Annotated[float | None, tyro.conf.arg(metavar="ALPHA", help_behavior_hint="")] = None
    """--to peft: the converter's alpha, which is not in a checkpoint."""
    max_shard_size: str = "5GB"
    """Largest file, e.g. 500MB or 4GiB; a single larger tensor is a file of its own."""
    with_optimizer: bool = False
    """dcp to dcp: carry optimizer state and everything else that is no model weight."""
    workers: int = 0
    """Threads that read, cast and write; 0 means two for each core, at most 8: one waits for the disk while the other
    computes."""
    dry_run: bool = False
    """Check everything, print the plan, the disk and the memory it needs, and write nothing."""
    verify: bool = False
    """Hold a DCP source against its own checksums first, and before DST appears read again what was written and
    compare it with the checksums that were taken meanwhile."""
    resume: bool = False
    """Keep the finished files of a run that was interrupted, where they are still as they were written."""
    overwrite: bool = False
    """Replace the checkpoint that is in DST; it stays until the new one is complete."""
    fsync: bool = False
    """Survive a power cut, too: have every file on the disk before it counts as finished."""
    allow_nan: bool = False
    """Exit with 0 although weights are NaN or infinite."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        of_adapter = self.to == "peft" or (self.src / "adapter_config.json").is_file()
        if of_adapter:
            for field in dataclasses.fields(self):
                if field.name not in _OF_AN_ADAPTER and getattr(self, field.name) != field.default:
                    raise BridgeError(
                        f"--{field.name.replace('_', '-')} is not for a LoRA adapter; leave it out"
                    )
        if self.lora_alpha is not None and self.to != "peft":
            raise BridgeError(f"--lora-alpha is for --to peft; with --to {self.to} leave it out")
        with imports():
            import torch  # with what follows, two seconds that a bad flag need not wait for

            from titan_bridge.checkpoint.reshard import Options, prepare
            from titan_bridge.checkpoint.team import Team

        if of_adapter:
            return self._adapter()

        options = Options(
            source=self.src,
            target=self.dst,
            to=self.to,  # type: ignore[arg-type]
            config=self.config,
            dtype=getattr(torch, self.dtype) if self.dtype else None,
            names=self.names,
            max_shard_size=parse_size(self.max_shard_size),
            merge_lora=self.merge_lora,
            with_optimizer=self.with_optimizer,
            workers=self.workers or min(8, 2 * len(os.sched_getaffinity(0))),
            overwrite=self.overwrite,
            resume=self.resume,
            verify=self.verify,
            fsync=self.fsync,
        )
        team = Team()
        if self.dry_run:
            job = prepare(options, team)
            if team.rank == 0:
                _show_plan(job, as_json=self.json)
            return 0
        team.join()
        try:
            jobs: list[Job] = []
            team.each(lambda: jobs.append(prepare(options, team)))
            return self._execute(jobs[0])
        finally:
            team.leave()

    def _adapter(self) -> int:
        from titan_bridge.checkpoint.team import Team

        team = Team()
        team.join()
        try:
            count = team.first(self._write_adapter)  # small: one process does it
        finally:
            team.leave()
        if team.rank == 0:
            facts = {"to": self.to, "tensors": count, "path": str(self.dst)}
            note = "; nothing was written" if self.dry_run else ""
            print(json.dumps(facts) if self.json else f"{self.dst}: a LoRA adapter, {count} tensors{note}")
        return 0

    def _write_adapter(self) -> int:
        from titan_bridge.checkpoint import adapter
        from titan_bridge.checkpoint.model_dir import weights_directory
        from titan_bridge.checkpoint.open import refuse_remote
        from titan_bridge.checkpoint.reshard import check_paths, stated_config
        from titan_bridge.models import load_hf_config
        from titan_bridge.run_folder import model_and_step

        refuse_remote(self.src)
        refuse_remote(self.dst)
        check_paths(weights_directory(str(self.src)) or self.src, self.dst, overwrite=self.overwrite)
        how = {"overwrite": self.overwrite, "dry_run": self.dry_run}
        if adapter.is_adapter(self.src):
            if self.to != "dcp":
                raise BridgeError(f"{self.src} is a LoRA adapter; allowed: --to dcp")
            if self.config is None:
                raise BridgeError(f"{self.src} has no config.json; give the model's with --config")
            return adapter.write_dcp(self.src, self.dst, hf=stated_config(self.config), **how)
        if self.lora_alpha is None:
            raise BridgeError(
                "--to peft needs --lora-alpha, the alpha of TorchTitan's LoRAConverter: no checkpoint has it"
            )
        hf = stated_config(self.config) if self.config else load_hf_config(model_and_step(self.src)[0])
        return adapter.write_peft(self.src, self.dst, hf=hf, alpha=self.lora_alpha, **how)

    def _execute(self, job: Job) -> int:
        start = time.perf_counter()
        try:
            with _bars(job) as bars:
                outcome = job.run(bars.advance)
        except KeyboardInterrupt:
            print("titan-bridge: stopped; --resume goes on from the files that are finished", file=sys.stderr)
            raise
        if job.team.rank:
            return 0
        facts = _facts(job, outcome, time.perf_counter() - start)
        if self.json:
            print(json.dumps(facts))
        else:
            _show_outcome(facts, self.dst)
            print(f"next: {_next(job)}")
        for line in _warnings(outcome, self.dtype):
            print(f"titan-bridge: {line}", file=sys.stderr)
        return 1 if (outcome.nan or outcome.inf) and not self.allow_nan else 0


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `1.5GiB` or `1000`. Raises BridgeError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise BridgeError(
            f"--max-shard-size {text!r} is not a size; give a number and one of {', '.join(_UNITS)[2:]}"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _bars(job: Job) -> Bars:
    options, written = job.options, job.target.nbytes
    totals = {
        "check": job.bytes_to_read if options.verify and job.source.format == "dcp" else 0,
        "write": written,
        "verify": written if options.verify or options.resume else 0,
    }
    size = job.team.size  # this process sees its own share only
    return Bars({what: total // size for what, total in totals.items()}, shown=job.team.rank == 0)


def _show_plan(job: Job, *, as_json: bool) -> None:
    options = job.options
    facts = {
        "source": {
            "path": str(options.source),
            "format": job.source.format,
            "tensors": len(job.source.tensors),
            "bytes": job.source.nbytes,
            "left_out_entries": job.source.left_out,
        },
        "target": {
            "path": str(options.target),
            "format": options.to,
            "tensors": len(job.tensors.tensors),
            "files": [{"name": f.name, "bytes": f.size} for f in job.target.files],
        },
        "copies": job.plan.copies_count,
        "bytes_to_read": job.bytes_to_read,
        "bytes_to_write": job.target.nbytes,
        "disk_free": job.free(),
        "memory": job.memory,
        "dropped": list(job.tensors.dropped),
    }
    if as_json:
        print(json.dumps(facts))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    title = f"{options.source} ({job.source.format}) to {options.target} ({options.to})"
    table = Table(title=title, title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    files = facts["target"]["files"]
    shown = files if len(files) <= 24 else files[:20]
    for file in shown:
        table.add_row(file["name"], _size(file["bytes"]))
    if len(shown) < len(files):
        table.add_row(
            f"and {len(files) - len(shown)} more", _size(sum(f["bytes"] for f in files[len(shown) :]))
        )
    console.print(table)
    console.print(
        f"{facts['target']['tensors']:,} tensors, {facts['copies']:,} copies; reads {_size(facts['bytes_to_read'])}, "
        f"writes {_size(facts['bytes_to_write'])} ({_size(facts['disk_free'])} free), "
        f"needs {_size(facts['memory'])} of memory beside the imports; nothing was written"
    )


def _facts(job: Job, outcome: Outcome, seconds: float) -> dict[str, Any]:
    return {
        "target": str(job.options.target),
        "format": job.options.to,
        "tensors": len(job.tensors.tensors),
        "files": list(outcome.files),
        "bytes_read": outcome.bytes_read,
        "bytes_written": outcome.bytes_written,
        "seconds": seconds,
        "resumed_parts": outcome.resumed_parts,
        "verified": job.options.verify,
        "source_checked": outcome.source_checked,
        "left_out_entries": job.source.left_out,
        "nan": dict(outcome.nan),
        "inf": dict(outcome.inf),
        "overflow": dict(outcome.overflow),
        "lost": dict(outcome.lost),
    }


def _show_outcome(facts: dict[str, Any], target: Path) -> None:
    rate = facts["bytes_written"] / max(facts["seconds"], 1e-9)
    notes = [f"{facts['resumed_parts']} files kept from the run before"] if facts["resumed_parts"] else []
    if facts["verified"]:
        source = "source checked" if facts["source_checked"] else "source not checked: it has no checksums"
        notes.append(f"verified, {source}")
    notes += (
        [f"{facts['left_out_entries']} entries of training state left out"]
        if facts["left_out_entries"]
        else []
    )
    print(
        f"{target}: {facts['tensors']:,} tensors in {len(facts['files'])} files, {_size(facts['bytes_written'])} "
        f"in {facts['seconds']:.1f} s ({_size(rate)}/s)" + "".join(f"; {note}" for note in notes)
    )


def _next(job: Job) -> str:
    """What to type with the result."""
    from titan_bridge.models import family_for  # torch, as in `run`

    options = job.options
    target = shlex.quote(str(options.target))
    command = f"titan-bridge serve {target}"
    if job.hf is None:
        return f"put the model's config.json into {target}, then {command}"
    try:
        family_for(job.hf)
    except BridgeError as error:
        return f"nothing here: this model is not served ({error})"
    return command


def _warnings(outcome: Outcome, dtype: str | None) -> list[str]:
    from titan_bridge.checkpoint.finite import not_finite_lines

    infinite = Counter(outcome.inf) - Counter(outcome.overflow)
    lines = [f"{line}; they were copied as they are" for line in not_finite_lines(outcome.nan, infinite)]
    if outcome.overflow:
        first, count = next(iter(outcome.overflow.items()))
        lines.append(
            f"{sum(outcome.overflow.values()):,} elements became infinite as {dtype}, first in {first} ({count:,}); "
            "choose a dtype with a wider range"
        )
    if outcome.lost:
        named = ", ".join(sorted(outcome.lost)[:3])
        lines.append(f"{len(outcome.lost)} tensors that are not zero have no place in this format: {named}")
    return lines


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError
