"""`titan-bridge train`: TorchTitan's Trainer from a TOML file."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from titan_bridge.commands.infer import Int, Text
from titan_bridge.cpu import is_cpu_backend
from titan_bridge.errors import BridgeError
from titan_bridge.json_file import finite

if TYPE_CHECKING:
    from titan_bridge.train.build import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model with TorchTitan's Trainer, from a TOML file (see configs/train/).

    Run again, it goes on from the last whole checkpoint of the output folder; a finished run is left as it is.

    Example: titan-bridge train configs/train/llama3_fsdp2.toml --set trainer.training.steps=50
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A .toml file (see configs/train/)."""
    nproc: Int = None
    """Number of processes, one per GPU; default: the product of the degrees."""
    out: Text = None
    """Folder for checkpoints, logs and TensorBoard; default: out/train/NAME of the file."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Set one key, for instance --set trainer.training.steps=50 or --set parallel.tp=2; may be repeated."""
    print_config: bool = False
    """Print every value and where it comes from, and train nothing."""
    json: bool = False
    """With --print-config: print JSON."""

    def run(self) -> int:
        job = job_of(self.file, self.set, {"nproc": self.nproc, "out": self.out})
        if self.print_config:
            rows = job.table()
            if self.json:
                values = {key: {"value": finite(value), "origin": origin} for key, value, origin in rows}
                print(json.dumps(values, default=str))
                return 0
            width = max(len(key) for key, _, _ in rows)
            for key, value, origin in rows:
                print(f"{key:<{width}}  {json.dumps(value, default=str):<24}  {origin}")
            return 0
        if is_cpu_backend():
            from titan_bridge.engine.cpu.head_dims import check_head_dim  # vLLM's platform, seconds

            try:
                check_head_dim(job.hf_config)
            except BridgeError as error:
                print(
                    f"titan-bridge: this model can be trained, but not served here: {error}", file=sys.stderr
                )
        from titan_bridge.run_folder import find
        from titan_bridge.train.launch import train
        from titan_bridge.train.output import METRICS
        from titan_bridge.train.progress import duration, read_metrics

        started = time.monotonic()
        if train(job, functools.partial(print, flush=True)):
            losses = read_metrics(job.out / METRICS)
            summary = f"done in {duration(time.monotonic() - started)}"
            if losses:
                summary += f"; loss {losses[min(losses)]['loss']:.4f} -> {losses[max(losses)]['loss']:.4f}"
            print(summary)
        run = find(job.out)
        print(f"checkpoint {run.directory if run.step is not None else 'none'}")
        if run.step is not None:
            print(f"next: titan-bridge serve {shlex.quote(str(job.out))}")
        return 0


def job_of(file: str, sets: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> Job:
    """What a TOML file describes, checked and ready to run.

    Args:
        sets, flags: As for `reader.resolve`.

    Raises:
        BridgeError: what is wrong in the file, or does not go together.
    """
    from titan_bridge.config import reader  # pydantic and tomli, not needed for --help
    from titan_bridge.config.schema import InferConfig
    from titan_bridge.config.train_schema import TrainConfig

    others = {"titan-bridge serve, generate, parity or inspect": InferConfig}
    resolved = reader.resolve(TrainConfig, file=file, sets=sets, flags=flags, others=others)
    # TorchTitan's configs warn when they are made, also of what is no concern of this run.
    logging.disable(logging.WARNING)
    from titan_bridge.train.build import build  # torch and torchtitan, only for a file that reads well

    return build(resolved.config, resolved.origin, name=Path(file).stem)
