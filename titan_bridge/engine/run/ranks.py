"""Generate offline with one process a dp rank, so that whatever happens there ends with this one.

Data parallel ranks of a mixture of experts, or of a model whose weights are sharded over them, step in lockstep, so
none may leave while another still generates: a rank that is done waits until all are, and only then shuts its engine
down. Other ranks share nothing, and vLLM has no offline dp for them: they run as engines of their own.

Ranks import vLLM while the parent still checks the config. Parent and rank share a folder; the rank's standard input
gives it its job with the first line, says "all ranks are done" with the second, and "the parent is gone" with its end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_bridge import cpu
from titan_bridge.checks import experts_in, model_directory
from titan_bridge.config.reader import from_dict
from titan_bridge.config.schema import InferConfig
from titan_bridge.engine.cpu import forking
from titan_bridge.engine.run.offline import (
    Completion,
    Prompt,
    Sampling,
    complete,
    drafts,
    engine,
    users_mistake,
)
from titan_bridge.errors import BridgeError
from titan_bridge.ports import free_port

VISIBLE = "CUDA_VISIBLE_DEVICES"

EXIT_SECONDS = 60
"""How long a dp rank may take to shut down after all ranks are done."""

INTERRUPT_SECONDS = 20
"""How long the ranks may take to shut down after Ctrl-C."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave, in the order of the prompts, and what served it."""

    completions: tuple[Completion, ...]
    workers: tuple[Mapping[str, Any], ...]
    """`BridgeWorker.bridge_report` of every worker, with its `dp_rank`."""
    load_seconds: float
    """From nothing to an engine that takes requests; the slowest rank's."""
    generate_seconds: float
    """From the first request to the last answer; the slowest rank's."""
    drafts: Mapping[str, int] | None = None
    """With speculation, of all ranks: tokens drafted ("draft"), and of these "accepted"."""
    killed_ranks: tuple[int, ...] = ()
    """dp ranks that answered but did not end by themselves."""

    @property
    def model_class(self) -> str:
        """The class that all workers loaded; `check_class` has made sure that it is one."""
        return self.workers[0]["model_class"]


def generate(
    config: InferConfig, prompts: Sequence[Prompt] | None = None, sampling: Sampling | None = None
) -> Outcome:
    """Load the model and continue the prompts.

    Args:
        config: what to serve and how; `config.generate` is used where the next two are None.
        prompts: texts or lists of token ids; dealt out to the dp ranks in turn.
        sampling: of all prompts, or one for each.

    Raises:
        BridgeError: bad model directory, sizes, options, or a class that is not ours.
        RuntimeError: a rank died; the message is the last error that it printed.
    """
    with start(config) as ranks:
        return ranks.generate(prompts, sampling)


@contextlib.contextmanager
def start(config: InferConfig) -> Iterator[Ranks]:
    """Start the dp ranks of `config`, which import vLLM while the caller does something else; they end with the body.

    Raises:
        BridgeError: no config.json.
    """
    lockstep = experts_in(model_directory(config.model)) or (
        config.model_impl == "torchtitan" and config.parallel.dense == "shard"
    )
    sizes, workers = config.parallel.sizes, config.parallel.workers
    dp = sizes.dp
    common = {**os.environ, **cpu.environment(sizes.world, given=os.environ, options=config.vllm)}
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(dp):
            environment = rank_environment(common, rank, dp, workers, port, lockstep)
            processes.append(_process({**common, **environment}))
        yield Ranks(config, processes, lockstep=lockstep)
    except KeyboardInterrupt:
        interrupt(processes)
        raise
    finally:
        for process in processes:
            end_group(process)


def _process(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "titan_bridge.engine.run.ranks"],
        stdin=subprocess.PIPE,
        env=environment,
        process_group=0,  # so that its engine and workers can be ended with it
    )


class Ranks:
    """One process for each dp rank, for one run."""

    def __init__(
        self, config: InferConfig, processes: Sequence[subprocess.Popen[bytes]], *, lockstep: bool
    ) -> None:
        self._config = config
        self._processes = processes
        self._lockstep = lockstep

    def generate(self, prompts: Sequence[Prompt] | None = None, sampling: Sampling | None = None) -> Outcome:
        """Load the model and continue the prompts; see the function of this name."""
        prompts = self._config.generate.prompts if prompts is None else prompts
        sampling = sampling_of(self._config) if sampling is None else sampling
        dp = len(self._processes)
        with tempfile.TemporaryDirectory(prefix="titan-bridge-") as folder:
            for rank, process in enumerate(self._processes):
                job = {
                    "config": dataclasses.asdict(self._config),
                    "prompts": [p if isinstance(p, str) else list(p) for p in prompts[rank::dp]],
                    "sampling": dict(sampling) if isinstance(sampling, Mapping) else list(sampling[rank::dp]),
                    "lockstep": self._lockstep,
                    "answer": f"{folder}/{rank}.json",
                }
                Path(folder, f"job{rank}.json").write_text(json.dumps(job))
                _tell(process, f"{folder}/job{rank}.json")
            answers = _wait(self._processes, [Path(folder, f"{rank}.json") for rank in range(dp)])
            killed = _release(self._processes)
        return _merge(answers, len(prompts), killed)


def sampling_of(config: InferConfig) -> dict[str, Any]:
    """`SamplingParams` keyword arguments of the config's [generate]."""
    ours = config.generate
    return {
        "max_tokens": ours.max_tokens,
        "temperature": ours.temperature,
        "top_p": ours.top_p,
        "top_k": ours.top_k,
        "seed": ours.seed,
        "ignore_eos": ours.ignore_eos,
    }


def rank_environment(
    common: Mapping[str, str], rank: int, dp: int, workers: int, port: int, lockstep: bool
) -> dict[str, str]:
    """What one dp rank needs in its environment beside `common`; an engine has so many `workers`."""
    if lockstep:
        return {
            "VLLM_DP_RANK": str(rank),
            "VLLM_DP_RANK_LOCAL": str(rank),
            "VLLM_DP_SIZE": str(dp),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(port),
        }
    if not cpu.is_cpu_backend():
        return {} if dp == 1 else {VISIBLE: ",".join(devices(common, rank, dp, workers))}
    cores = common.get(cpu.BIND, "").split("|")
    return (
        {cpu.BIND: "|".join(cores[rank * workers : (rank + 1) * workers])}
        if len(cores) == dp * workers
        else {}
    )


def devices(common: Mapping[str, str], rank: int, dp: int, workers: int) -> list[str]:
    """The GPUs of a dp rank whose engine knows of no other; each would take the first ones."""
    if not common.get(VISIBLE):
        return [str(device) for device in range(rank * workers, (rank + 1) * workers)]
    visible = common[VISIBLE].split(",")
    if len(visible) < dp * workers:
        raise BridgeError(
            f"{VISIBLE}={common[VISIBLE]} names {len(visible)} GPUs; dp={dp} with pp*tp={workers} needs {dp * workers}"
        )
    return visible[rank * workers : (rank + 1) * workers]


def _wait(ranks: Sequence[subprocess.Popen[bytes]], files: Sequence[Path]) -> list[dict[str, Any]]:
    answers: dict[int, dict[str, Any]] = {}
    while len(answers) < len(ranks):
        for rank in sorted(set(range(len(ranks))) - set(answers)):
            ended = ranks[rank].poll()  # before looking for the answer, which a rank writes before it ends
            if files[rank].exists():
                answers[rank] = _read(rank, files[rank])
            elif ended is not None:
                raise RuntimeError(f"dp rank {rank} ended with exit code {ended} before it answered")
        time.sleep(0.05)
    return [answers[rank] for rank in range(len(ranks))]


def _read(rank: int, file: Path) -> dict[str, Any]:
    answer = json.loads(file.read_text())
    if error := answer.get("error"):
        raise BridgeError(error)
    if failure := answer.get("failure"):
        raise RuntimeError(f"dp rank {rank}: {failure}")
    return answer


def _release(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, ...]:
    """Let the ranks shut down; returns those that had to be killed."""
    for process in ranks:
        _tell(process, "all done")
    deadline = time.monotonic() + EXIT_SECONDS
    killed = []
    for rank, process in enumerate(ranks):
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            killed.append(rank)
    return tuple(killed)


def _tell(rank: subprocess.Popen[bytes], line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has ended, which is found out elsewhere
        assert rank.stdin is not None
        rank.stdin.write(f"{line}\n".encode())
        rank.stdin.flush()


def interrupt(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Hand Ctrl-C on, and wait a little: an engine that is killed leaves its sockets and shared memory behind."""
    for process in ranks:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + INTERRUPT_SECONDS
    for process in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process that leads a group, and of its children."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    with contextlib.suppress(ProcessLookupError):  # nothing left, as it should be
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _merge(answers: Sequence[Mapping[str, Any]], prompts: int, killed: tuple[int, ...]) -> Outcome:
    dp, counted = len(answers), answers[0]["drafts"]
    completions = [answers[i % dp]["completions"][i // dp] for i in range(prompts)]
    return Outcome(
        completions=tuple(Completion(**{k: _frozen(v) for k, v in c.items()}) for c in completions),
        workers=tuple({"dp_rank": rank, **w} for rank, a in enumerate(answers) for w in a["workers"]),
        load_seconds=max(a["load_seconds"] for a in answers),
        generate_seconds=max(a["generate_seconds"] for a in answers),
        drafts=counted and {name: sum(a["drafts"][name] for a in answers) for name in counted},
        killed_ranks=killed,
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _run_rank() -> int:
    """Body of one dp rank's process."""
    told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            told.put(line.rstrip("\n"))
        os.killpg(0, signal.SIGKILL)  # the parent is gone: end this rank, its engine and its workers

    threading.Thread(target=listen, daemon=True).start()
    forking.start()
    with contextlib.suppress(Exception):  # raised again where it can be answered
        _ = importlib.import_module("vllm").LLM
    job = json.loads(Path(told.get()).read_text())
    config = from_dict(InferConfig, job["config"])
    # A rank with nothing to do must still take part in lockstep; its answer is dropped. Ids need no tokenizer.
    prompts, sampling = (job["prompts"], job["sampling"]) if job["prompts"] else ([[0]], {"max_tokens": 1})
    try:
        with engine(config) as (llm, workers, load_seconds):
            completions, seconds = complete(llm, prompts, sampling)
            answer = {
                "completions": [dataclasses.asdict(c) for c in completions] if job["prompts"] else [],
                "workers": workers,
                "load_seconds": load_seconds,
                "generate_seconds": seconds,
                "drafts": drafts(llm),
            }
            _write(job["answer"], answer)
            told.get()
    except KeyboardInterrupt:  # handed on by the parent, which says what there is to say
        return 130
    except Exception as error:
        traceback.print_exc()
        _write(job["answer"], {"error": users_mistake(error), "failure": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _write(path: str, answer: Mapping[str, Any]) -> None:
    Path(f"{path}.part").write_text(json.dumps(answer))
    os.replace(f"{path}.part", path)


if __name__ == "__main__":
    sys.exit(_run_rank())
