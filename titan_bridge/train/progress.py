"""How a run tells where it is: a line for each logged step, and the same as JSON in the output folder.

TorchTitan's own metrics go on beside it (TensorBoard, its log line); this is one more logger among them.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist
from torchtitan.components.metrics import BaseLogger, LoggerContainer
from torchtitan.trainer import Trainer


class ProgressLogger(BaseLogger):
    """Prints `step 20/300  loss 5.4321  3,210 tokens/s  1 min 52 s left` and appends to metrics.jsonl.

    Args:
        steps: of the whole run.
        devices: ranks; TorchTitan counts tokens a second and device.
        screen: where the lines go.
        file: metrics.jsonl.
    """

    def __init__(self, *, steps: int, devices: int, screen: TextIO, file: Path) -> None:
        self.steps, self.devices, self.screen, self.file = steps, devices, screen, file
        self.first: tuple[int, float] | None = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        now = time.monotonic()
        loss, speed = metrics["loss_metrics/global_avg_loss"], metrics["throughput(tps)"] * self.devices
        left = ""
        if self.first is None:
            self.first = (step, now)  # the first step includes what is done once
        elif step < self.steps:
            rate = (now - self.first[1]) / (step - self.first[0])
            left = f"  {duration((self.steps - step) * rate)} left"
        width = len(str(self.steps))
        line = f"step {step:{width}}/{self.steps}  loss {loss:.4f}  {speed:,.0f} tokens/s{left}"
        print(line, file=self.screen, flush=True)
        record = {
            "step": step,
            "loss": loss,
            "max_loss": metrics["loss_metrics/global_max_loss"],
            "grad_norm": metrics["grad_norm"],
            "tokens_per_second": round(speed, 1),
            "tokens": metrics.get("n_tokens_seen"),
        }
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(record) + "\n")


def add_progress(trainer: Trainer, screen: TextIO, file: Path) -> None:
    """Add a `ProgressLogger` to the loggers of a trainer; call it on the rank that knows the loss."""
    container = LoggerContainer()
    container.add_logger(trainer.metrics_processor.logger)
    container.add_logger(
        ProgressLogger(
            steps=trainer.config.training.steps, devices=dist.get_world_size(), screen=screen, file=file
        )
    )
    trainer.metrics_processor.logger = container


def read_metrics(file: Path) -> dict[int, dict[str, Any]]:
    """Step -> what metrics.jsonl says of it; a step that was done twice (after a crash) counts the last time."""
    found: dict[int, dict[str, Any]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # a line cut short by a crash
                continue
            found[record["step"]] = record
    return found


def forget_after(file: Path, step: int) -> None:
    """Leave the records up to `step` in metrics.jsonl, whole ones, each step once."""
    kept = [record for done, record in sorted(read_metrics(file).items()) if done <= step]
    if file.exists():
        new = file.with_name(f".{file.name}.new")
        new.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(new, file)


def duration(seconds: float) -> str:
    """For example `1 min 52 s`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
