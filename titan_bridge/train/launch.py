"""Start a run: validate everything, write the record and the tokenizer, then torchrun.

Nothing but the lock is written before everything was checked, and no checkpoint that is whole is ever changed: where
training begins before it, it is set aside under another name.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import torch

import titan_bridge
from titan_bridge.checkpoint.checkpoint import Checkpoint
from titan_bridge.checkpoint.dcp import is_dcp, open_dcp
from titan_bridge.cpu import cores
from titan_bridge.errors import BridgeError
from titan_bridge.models.build import build_on_meta
from titan_bridge.run_folder import CHECKPOINT, Record, step_folder, whole_steps
from titan_bridge.train import data, tokenizer
from titan_bridge.train.build import Job, on_cpu
from titan_bridge.train.guard import die_with_parent, lock
from titan_bridge.train.output import DOCUMENTS, LOGS, METRICS, check_same_run, remove_partial, set_aside
from titan_bridge.train.progress import forget_after

WORKER = "titan_bridge.train.worker"


def train(job: Job, tell: Callable[[str], object] = lambda line: None) -> bool:
    """Run to the end, from the last checkpoint if there is one.

    Args:
        tell: Called with one line if the run goes on, or has nothing to do.

    Returns:
        Whether there was anything to do: False if the last step is there already.

    Raises:
        BridgeError: what the user can put right: data, an output folder of another model, a full disk.
        RuntimeError: a rank failed; the message is its error and names the log.
    """
    # Before there is a folder, so that a refusal leaves none.
    documents = None if job.out.exists() else _documents(job, resuming=False)
    try:
        descriptor = lock(job.out)
    except OSError as error:
        raise BridgeError(f"{job.out} cannot be written: {error.strerror}") from None
    try:
        folder = job.out / CHECKPOINT
        record = _record(job)
        begin = _begin(job, folder, record, tell)
        if begin is None:
            return False
        if documents is None or begin != -1:
            documents = _documents(job, resuming=begin != -1)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_partial(folder)
            _write(job, record, documents, resuming=begin != -1)
            forget_after(job.out / METRICS, begin)
            if not job.trainer.checkpoint.load_only:
                for step, aside in set_aside(folder, begin).items():
                    tell(
                        f"{job.out}: step {step} is of the training that this one replaces; set aside as {aside}"
                    )
        except OSError as error:
            raise BridgeError(f"{job.out} cannot be written: {error.strerror}") from None
        _torchrun(job, folder, descriptor, begin)
    finally:
        os.close(descriptor)
    return True


def _begin(job: Job, folder: Path, record: Record, tell: Callable[[str], object]) -> int | None:
    """The step to go on from, checked: -1 for a new run, None where there is nothing to do."""
    check_same_run(folder, record)
    checkpoint, wanted = job.trainer.checkpoint, job.trainer.training.steps
    steps, begin = whole_steps(folder), checkpoint.load_step
    if steps and not checkpoint.enable:
        raise BridgeError(
            f"{folder} holds checkpoints (step {', '.join(map(str, steps))}), and with trainer.checkpoint.enable = "
            "false training would begin anew; leave it out to go on from them, or choose another out"
        )
    if begin != -1:
        check_checkpoint(job, step_folder(folder, begin))
    last = max(steps, default=-1) if begin == -1 else begin
    if last >= wanted:
        tell(f"{job.out}: nothing to do, step {last} is there and trainer.training.steps is {wanted}")
        return None
    if begin == -1:
        begin = _last_to_go_on_from(job, folder)
    if begin != -1:
        tell(f"{job.out}: going on from step {begin}")
    elif (path := checkpoint.initial_load_path) and is_dcp(Path(path)):
        _open(Path(path)).close()
    return begin


def _last_to_go_on_from(job: Job, folder: Path) -> int:
    """The last step with all that training needs; -1 where there is no checkpoint.

    Raises:
        BridgeError: there are exports only, or a checkpoint is of another model.
    """
    steps = whole_steps(folder)
    for step in reversed(steps):
        if steps[step] == "dcp" and (check_checkpoint(job, folder / f"step-{step}") or step == 0):
            return step
    if steps:
        raise BridgeError(
            f"{folder} holds exports of the weights only (step {', '.join(map(str, steps))}), from which training "
            "cannot go on to more steps; choose another out, and to begin with these weights give "
            "trainer.checkpoint.initial_load_path and, for safetensors, trainer.checkpoint.initial_load_in_hf=true"
        )
    return -1


def check_checkpoint(job: Job, step: Path) -> bool:
    """Compare names and shapes in a DCP with the model's, from its metadata alone.

    Returns:
        Whether it has the state of the training, too (`checkpoint.last_save_model_only` leaves it out).

    Raises:
        BridgeError: the first tensor that differs.
    """
    checkpoint = _open(step)
    checkpoint.close()
    assert job.trainer.model_spec is not None
    model = build_on_meta(job.trainer.model_spec.model, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        entry = checkpoint.tensors.get(name)
        if entry is None:
            raise BridgeError(f"{step} holds another model: it has no {name}; choose another out")
        if entry.shape != tuple(tensor.shape):
            raise BridgeError(
                f"{step} holds another model: {name} is {entry.shape} there, {tuple(tensor.shape)} here; "
                "choose another out"
            )
    others = [*checkpoint.extra_tensors, *checkpoint.blobs]
    return any(name.split(".")[0] == "train_state" for name in others)


def _open(step: Path) -> Checkpoint:
    """A checkpoint by its metadata. TorchTitan unpickles `.metadata`, whatever is in it: ours refuses first."""
    try:
        return open_dcp(step, extra=True)
    except BridgeError as error:
        raise BridgeError(
            f"{step} cannot be read as a checkpoint: {error}; remove it or choose another out"
        ) from None


def threads(nproc: int) -> int:
    """OMP threads a rank: the cores are divided, and a rank has at least one."""
    return max(1, len(cores()) // nproc)


def _record(job: Job) -> Record:
    folder = job.out / CHECKPOINT
    config = dataclasses.asdict(job.config) | {"out": str(job.out)}
    return Record(
        family=job.family.name,
        hf_config=job.hf_config,
        expert_bias=job.expert_bias,
        tokenizer=tokenizer.files_in(folder),
        dtype=job.trainer.training.dtype,
        sizes=job.sizes.counts,
        nproc=job.nproc,
        config=config,
        origin=dict(job.origin),
        trainer=job.trainer.to_dict(),
        versions={"titan_bridge": titan_bridge.__version__}
        | {name: metadata.version(name) for name in ("torchtitan", "torch")},
    )


def _documents(job: Job, *, resuming: bool) -> data.Documents | None:
    """The text of the run: as before when it goes on, else found now. None for data that are not ours."""
    if job.config.data is None:
        return None
    if not resuming:
        return data.find_documents(job.config.data, ranks=job.data_ranks)
    file = job.out / DOCUMENTS
    try:
        documents = data.Documents.read(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BridgeError(
            f"{file}, which says what text this run reads, cannot be read ({error}); restore it, or choose another out"
        ) from None
    if (gone := documents.missing()) is not None:
        raise BridgeError(
            f"{gone}, which this run reads, is gone or shorter than it was; restore it, or choose another out"
        )
    return documents


def _write(job: Job, record: Record, documents: data.Documents | None, *, resuming: bool) -> None:
    folder = job.out / CHECKPOINT
    if documents is not None:
        assert job.config.data is not None
        if not (resuming and tokenizer.files_in(folder)):
            documents.write(job.out / DOCUMENTS)
            texts = data.texts(documents, tokenizer.TEXT_TO_TRAIN_ON)
            limit = job.hf_config["max_position_embeddings"]
            tokenizer.make(job.config.data, texts, folder, max_length=limit)
    elif os.path.isdir(job.trainer.hf_assets_path):
        tokenizer.copy(Path(job.trainer.hf_assets_path), folder)
    end = tokenizer.eos_token_id(folder)
    hf_config = record.hf_config | {"bos_token_id": None, "eos_token_id": end}
    dataclasses.replace(record, hf_config=hf_config, tokenizer=tokenizer.files_in(folder)).write(folder)


def _torchrun(job: Job, folder: Path, descriptor: int, begin: int) -> None:
    logs = job.out / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("*.log"):
        old.unlink()
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(
            "--standalone",
            "--local-addr",
            "127.0.0.1",
            "--nproc-per-node",
            str(job.nproc),
            "--max-restarts",
            "0",
            "--log-dir",  # else it leaves a folder of its own in the temporary one when it is interrupted
            os.devnull,
        ),
        *("-m", WORKER, str(folder), str(begin)),
    ]
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        **({"OMP_NUM_THREADS": str(threads(job.nproc))} if on_cpu() else {}),
        **os.environ,
    }
    with (logs / "torchrun.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stderr=log,
            env=environment,
            pass_fds=(descriptor,),
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C reaches us, and we tell torchrun once
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )
        try:
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    if code:
        _explain(logs, code)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


_SECONDARY = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ChildFailedError",
    "SIGTERM",
)


def _explain(logs: Path, code: int) -> None:
    """Raise the error that ended the run: what a rank said to the user, else the first error in its log."""
    texts = {file: file.read_text(encoding="utf-8", errors="replace") for file in sorted(logs.glob("*.log"))}
    said: list[str] = [
        message.strip()
        for text in texts.values()
        for message in re.findall(
            r"^(?:\w+\.)*(?:BridgeError|UnsupportedModelError): (.+)$", text, re.MULTILINE
        )
    ]
    if said:  # of ranks that ran into a full disk, one may have seen it before another one made room
        raise BridgeError(max(said, key=lambda message: "make room" in message))
    errors = [(line, file) for file, text in texts.items() for line in _errors(text)]
    first = [pair for pair in errors if not any(word in pair[0] for word in _SECONDARY)] or errors
    if first:
        raise RuntimeError(f"{first[0][0]} (log: {first[0][1]})")
    raise RuntimeError(
        f"torchrun ended with {code} and no rank said why; killed, or out of memory (logs: {logs})"
    )


def _errors(text: str) -> Sequence[str]:
    return re.findall(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception)\b: .+)$", text, re.MULTILINE)
