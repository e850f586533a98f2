"""Engines whose processes are forked from one that has imported vLLM: what these get, and their numbers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from multiprocessing import context
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import descendants
from titan_bridge import cpu, parity
from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.engine.cpu import forking
from titan_bridge.engine.patches import apply, processes, upstream
from titan_bridge.errors import BridgeError
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The process id of a fork server of this test's own, in the environment in which vLLM starts processes."""
    forking.stop()
    monkeypatch.delenv(forking.METHOD, raising=False)
    forking.start()
    for name, value in cpu.set_by_vllm(os.environ).items():
        monkeypatch.setenv(name, value)
    pid = forking.server_pid()
    assert pid is not None
    yield pid
    forking.stop()
    assert pid not in descendants()


def tell(path: str, generations: int) -> None:
    """Write down what a process was born with, also of a child that it starts itself; ends with exit code 7."""
    import torch

    Path(f"{path}.{generations}").write_text(
        json.dumps(
            {
                "parent": os.getppid(),
                "given": os.environ.get("GIVEN"),
                "cores": sorted(os.sched_getaffinity(0)),
                "threads": torch.get_num_threads(),
                "imported": "vllm.v1.worker.cpu_worker" in sys.modules,
            }
        )
    )
    print(f"generation {generations} was here")
    if generations > 1:
        run(path, generations - 1)
    sys.exit(7)


def run(path: str, generations: int) -> None:
    ours = forking.process_context(processes.share_fork_server)
    assert ours is not None
    child = ours.Process(target=tell, args=(path, generations))
    child.start()
    child.join()
    assert child.exitcode == 7


def test_a_process_is_born_with_what_a_new_one_takes_from_its_parent(
    server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GIVEN", "after the server's start")
    core = max(os.sched_getaffinity(0))
    monkeypatch.setenv("GOMP_CPU_AFFINITY", str(core))
    run(str(tmp_path / "told"), 2)
    for generation in (2, 1):
        told = json.loads((tmp_path / f"told.{generation}").read_text())
        assert told == {
            "parent": server,
            "given": "after the server's start",
            "cores": [core],
            "threads": 1,
            "imported": True,
        }
    printed = capfd.readouterr().out
    assert [f"generation {n} was here" in printed for n in (1, 2)] == [True, True]
    assert len(os.listdir(f"/proc/{server}/task")) == 1  # a fork of more threads than one may hang


def test_threads_that_are_spread_over_cores_need_a_new_process(
    server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = forking.process_context(processes.share_fork_server)
    assert ours is not None
    for cores, kind in (("0 1", context.SpawnProcess), ("0", context.ForkServerProcess)):
        monkeypatch.setenv("GOMP_CPU_AFFINITY", cores)
        assert isinstance(ours.Process(target=tell), kind)


def test_what_only_a_new_process_notices_starts_a_new_server(
    server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forking.start()
    assert forking.server_pid() == server
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert forking.process_context(processes.share_fork_server) is None
    forking.start()
    assert forking.server_pid() != server
    assert forking.process_context(processes.share_fork_server) is not None


def test_asked_for_new_processes_no_server_runs(server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forking.METHOD, "spawn")
    forking.start()
    assert forking.server_pid() is None
    assert forking.process_context(processes.share_fork_server) is None
    assert server not in descendants()


def test_a_folder_too_long_for_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("a" * 70)))
    with pytest.raises(
        BridgeError, match=r"TMPDIR=.*aaa is too long for the sockets in it; allowed: 70 bytes"
    ):
        forking.start()


@pytest.mark.timeout(500)  # three engines
def test_an_engine_of_forked_processes_has_the_bits_of_one_of_new_ones(
    server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_orphans: None
) -> None:
    from titan_bridge.engine.run.offline import complete, engine

    monkeypatch.setenv(cpu.BIND, cpu.bind(2, cpu.cores()) or "0|1")
    config = InferConfig(
        model=str(make_checkpoint(tmp_path / "model", "qwen3_moe")),
        dtype="float32",
        parallel=Parallel(tp=2, ep=2),
        max_model_len=parity.LONGEST,
        vllm={**parity.ENGINE_OPTIONS, "enforce_eager": True},
    )
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    for name in cpu.set_by_vllm(os.environ):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    rounds = parity.rounds(parity.prompts(512)[-3:])

    def answers(llm: Any, workers: list[dict[str, Any]]) -> list[Any]:
        assert {worker["model_class"] for worker in workers} == {
            "titan_bridge.engine.model.wrapper.TitanForCausalLM"
        }
        assert (
            dict(os.environ) == before
        )  # what vLLM has set is not taken for a wish of the next engine's user
        # One after the other, so that all engines see the same batches.
        each = [complete(llm, [p], sampling)[0][0] for p, sampling in zip(*rounds, strict=True)]
        return [(one.token_ids, one.logprobs, one.prompt_logprobs) for one in each]

    def processes() -> dict[int, int]:
        """Parents of the engines' processes, by process id."""
        children = [psutil.Process(pid) for pid in descendants()]
        return {each.pid: each.ppid() for each in children if "VLLM::" in " ".join(each.cmdline())}

    with engine(config) as (llm, workers, _):
        forked = answers(llm, workers)
        first = processes()
        assert len(first) == 3  # the engine and two workers
        assert set(first.values()) == {forking.server_pid()}
        with engine(config) as (other, others, _):
            assert answers(other, others) == forked
            assert set(processes().values()) == {forking.server_pid()}
            assert first.items() <= processes().items()
        assert answers(llm, workers) == forked  # a second engine has come and gone
    monkeypatch.setenv(forking.METHOD, "spawn")
    before[forking.METHOD] = "spawn"
    with engine(config) as (llm, workers, _):
        assert forking.server_pid() not in processes().values()
        assert answers(llm, workers) == forked


def test_vllm_starts_its_processes_through_functions_that_are_known() -> None:
    import vllm.v1.engine.coordinator
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor

    upstream.install()
    for module in (vllm.v1.engine.utils, vllm.v1.engine.coordinator, vllm.v1.executor.multiproc_executor):
        assert getattr(module.get_mp_context, apply.MARK)
