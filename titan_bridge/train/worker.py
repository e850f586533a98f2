"""One rank of a training run: `python -m titan_bridge.train.worker OUT/checkpoint STEP`, started by torchrun.

It builds TorchTitan's config from the record that `launch.py` wrote and hands it to TorchTitan's Trainer. Progress
goes to the standard output of the whole run; everything else to OUT/logs/rank_N.log.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torchtitan.observability import structured_logger as sl
from torchtitan.trainer import Trainer

from titan_bridge.config.reader import from_dict
from titan_bridge.config.train_schema import TrainConfig
from titan_bridge.errors import BridgeError
from titan_bridge.run_folder import Record, whole_steps
from titan_bridge.train import compat, data
from titan_bridge.train.build import Job, build, on_cpu
from titan_bridge.train.guard import die_with_parent
from titan_bridge.train.output import LOGS, METRICS, remove_partial
from titan_bridge.train.progress import add_progress

_ROOM = 1 << 20
"""Bytes below which a file system counts as full."""

_FULL = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "quota exceeded",
    errno.EFBIG: "file size limit reached",
}


def main(checkpoint: str, begin: str) -> int:
    """Train from the checkpoint of step `begin` (-1: from the start) to the end, or to an error; the log says which."""
    die_with_parent()
    folder = Path(checkpoint)
    screen = _redirect(folder.parent / LOGS)
    try:
        _train(folder, int(begin), screen)
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        # Before the log, which may need the room that this makes.
        reason = _failed_save(text, folder)
        with contextlib.suppress(OSError):
            sys.stderr.write(text if reason is None else f"{text}\nBridgeError: {reason}\n")
            sys.stderr.flush()
        # Other ranks may wait for this one in a collective that has no end; torchrun ends them.
        os._exit(1)
    return 0


def _train(folder: Path, begin: int, screen: TextIO) -> None:
    record = Record.read(folder)
    config = from_dict(TrainConfig, record.config)
    compat.apply()
    if on_cpu():
        from titan_bridge.train import cpu  # noqa: PLC0415  absent where there is an accelerator

        cpu.apply()
    job = build(config, record.origin, name=folder.parent.name)
    # TorchTitan by itself takes the last step, which may be an export that it cannot load.
    job.trainer.checkpoint.load_step = begin
    if config.data is not None:
        data.register()
    _run(job, folder, screen)


def _run(job: Job, folder: Path, screen: TextIO) -> None:
    sl.init_structured_logger(
        source="training",
        output_dir=job.trainer.dump_folder,
        enable=job.trainer.debug.enable_structured_logging,
    )
    trainer: Trainer = job.trainer.build()
    try:
        if dist.get_rank() == 0:
            print(_headline(job, trainer), file=screen, flush=True)
            add_progress(trainer, screen, folder.parent / METRICS)
        trainer.train()
    finally:
        trainer.close()
    dist.destroy_process_group()


def _headline(job: Job, trainer: Trainer) -> str:
    parameters = sum(parameter.numel() for part in trainer.model_parts for parameter in part.parameters())
    degrees = (
        " ".join(f"{name}={size}" for name, size in job.sizes.counts.items() if size > 1) or "one process"
    )
    device = "cpu" if on_cpu() else torch.accelerator.current_accelerator()
    training = job.trainer.training
    return (
        f"{job.family.name}, {parameters:,} parameters, {degrees} on {device}; "
        f"{training.steps} steps of {job.data_ranks} x {training.local_batch_size} x {training.seq_len} tokens"
    )


def _redirect(logs: Path) -> TextIO:
    """Send both outputs of this process to its log file; returns what was the standard output."""
    logs.mkdir(parents=True, exist_ok=True)
    screen = os.fdopen(os.dup(1), "w")
    log = os.open(logs / f"rank_{os.environ['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr, force=True
    )
    return screen


def _failed_save(text: str, folder: Path) -> str | None:
    """What to tell the user if the error came of a save; removes the checkpoint that it cut short.

    Args:
        text: the traceback. torch wraps the error of each rank, and its file format hides the errno of some.
    """
    if "state_dict_saver.py" not in text:
        return None
    words = {os.strerror(code): word for code, word in _FULL.items()}
    why = next((word for message, word in words.items() if message in text), None)
    if why is None and shutil.disk_usage(folder).free < _ROOM:
        why = _FULL[errno.ENOSPC]
    remove_partial(folder)  # on every rank: the first that fails may be the last that is let live
    whole = whole_steps(folder)
    last = f"the last whole checkpoint is step-{max(whole)}" if whole else "there is no whole checkpoint yet"
    advice = "make room and run the same command to go on" if why else "run the same command to go on"
    return f"a checkpoint could not be saved in {folder}: {why or text.strip().splitlines()[-1]}; {last}; {advice}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise BridgeError("usage: python -m titan_bridge.train.worker OUT/checkpoint STEP (under torchrun)")
    sys.exit(main(*sys.argv[1:]))
