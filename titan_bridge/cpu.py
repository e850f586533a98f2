"""Which cores the workers of vLLM's CPU backend run on, how much memory each takes for its KV cache, and what it keeps.

Left alone, vLLM binds worker N to NUMA node N and refuses to start when there are more workers than nodes,
and every worker claims most of the machine's memory. `environment` returns the variables that put both right;
what the user has set is never changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

BIND = "VLLM_CPU_OMP_THREADS_BIND"
BOUND = "TITAN_BRIDGE_BOUND"
"""The value of `BIND` that the plugin has set, which it may change for the next engine of the process."""
KV_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE"
SHARED = "TITAN_BRIDGE_SHARED_CORES"
"""Set to 1 where workers share cores; a dp rank's own part of the binding does not show it."""

WORKERS = "TITAN_BRIDGE_LOCAL_WORKERS"
"""How many workers this machine runs, of all dp ranks; the rest of a layout's ranks may be elsewhere."""

_MALLOC = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Variables with which a user tells glibc what memory to keep."""

_SYS = Path("/sys/devices/system")


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Core:
    """One physical core: its NUMA node and the first of its logical CPUs that we may use."""

    node: int
    cpu: int


def is_cpu_backend() -> bool:
    """Whether the vLLM that is installed computes on the CPU. Imports nothing."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return name == "vllm-cpu" or "cpu" in metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return False


def cores() -> tuple[Core, ...]:
    """Physical cores that this process may use, ordered by NUMA node; logical CPUs of one core count once."""
    nodes = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in sorted((_SYS / "node").glob("node[0-9]*"))
        for cpu in parse_cpus((folder / "cpulist").read_text())
    }
    seen: dict[tuple[str, str], Core] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        topology = _SYS / f"cpu/cpu{cpu}/topology"
        try:
            name = (
                (topology / "physical_package_id").read_text().strip(),
                (topology / "core_id").read_text().strip(),
            )
        except OSError:  # no topology (some containers): each logical CPU is a core
            name = ("", str(cpu))
        seen.setdefault(name, Core(node=nodes.get(cpu, 0), cpu=cpu))
    return tuple(sorted(seen.values()))


def unbound_cpus() -> frozenset[int]:
    """Logical CPUs for work that vLLM's binding of this process is not meant for, such as reading weights.

    A worker of the CPU backend, and every thread that it starts, is bound to the cores that it computes on, which may
    be one; the process that started it is not, and keeps to what the user allows.
    """
    own = os.sched_getaffinity(0)
    if len(own) > 1:
        return frozenset(own)
    try:
        return frozenset(own | os.sched_getaffinity(os.getppid()))
    except OSError:  # the parent has ended, or is not ours to look at
        return frozenset(own)


def parse_cpus(text: str) -> tuple[int, ...]:
    """`"0-2,5"` -> `(0, 1, 2, 5)`."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def bind(workers: int, cores: Sequence[Core]) -> str | None:
    """The value of `VLLM_CPU_OMP_THREADS_BIND`: one list of CPUs a worker, in the order of ranks (dp, pp, tp).

    Args:
        workers: ranks on this machine, dp * pp * tp.
        cores: what `cores()` returned.

    Returns:
        For instance `"0,1|2,3"`. None where vLLM's own choice (a NUMA node a worker) works. Each worker gets
        neighbouring cores; with four or more a worker, one of them is left to the engine's own process. With
        fewer cores than workers, workers share a core.
    """
    if workers <= len({core.node for core in cores}):
        return None
    if len(cores) < workers:
        return "|".join(str(cores[rank % len(cores)].cpu) for rank in range(workers))
    edges = [rank * len(cores) // workers for rank in range(workers + 1)]
    groups = [cores[start:stop] for start, stop in itertools.pairwise(edges)]
    return "|".join(",".join(str(c.cpu) for c in (g[:-1] if len(g) >= 4 else g)) for g in groups)


def local_workers(dp: int, workers: int, *, nnodes: int = 1, dp_local: int | None = None) -> int:
    """Workers on this machine, as vLLM spreads them over `nnodes`.

    `workers` of one engine: pp * tp. `dp_local` is vLLM's `data_parallel_size_local`.
    """
    if nnodes == 1:
        return (dp_local or dp) * workers
    dp_local = dp_local or max(1, dp // nnodes)
    return dp_local * workers // max(1, nnodes * dp_local // dp)


def shares_cores(given: Mapping[str, str]) -> bool:
    """Whether some workers are bound to the same core, by the environment of one of them."""
    if SHARED in given:
        return given[SHARED] == "1"
    lists = given.get(BIND, "").split("|")  # else "all", "auto" or "nobind"
    bound = [cpu for text in lists if text[:1].isdigit() for cpu in parse_cpus(text)]
    return len(set(bound)) < len(bound)


def kv_cache_gib(workers: int, available_bytes: int) -> int:
    """Whole GiB of KV cache a worker: together at most a quarter of the memory that is free, from 1 to 4 each.

    Every GiB is cleared when a worker starts, which takes about two seconds on a small machine.
    """
    return max(1, min(4, available_bytes // 4 // workers // 2**30))


def available_memory() -> int:
    """Bytes of memory that can be taken now, as the kernel estimates them."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees for its next step; returns whether it will.

    Left alone, glibc gives what a large step used back to the kernel, and the next step faults in each page
    anew. Blocks over 32 MiB still come and go, and the heap shrinks once over 1 GiB at its end is free. With another
    allocator in its place (vLLM loads tcmalloc where its package has it) this does nothing.
    """
    if any(name in os.environ for name in _MALLOC):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    return bool(mallopt(trim_threshold, 2**30)) and bool(mallopt(mmap_threshold, 2**25))


def set_by_vllm(given: Mapping[str, str]) -> dict[str, str]:
    """Variables that the CPU backend sets on its way to the first process it starts, and that matter when it imports.

    As `CpuPlatform.check_and_update_config` of vllm 0.32 does (`vllm/platforms/cpu.py`): without torch's OpenMP loaded
    first, threads that are bound would share one core.
    """
    found = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
    loaded = given.get("LD_PRELOAD", "")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or re.search("lib(g|i)?omp", loaded):
        return found
    package = Path(spec.origin).parent
    folders = (package.parent / "torch.libs", package / "lib")
    if openmp := [str(file) for folder in folders for file in folder.glob("libgomp*.so*")]:
        found["LD_PRELOAD"] = ":".join(filter(None, (loaded, openmp[0])))
    return found


def openmp_cores(given: Mapping[str, str]) -> tuple[int, ...]:
    """Logical CPUs that vLLM names for the OpenMP threads of the worker that it starts; empty where it names none."""
    return tuple(int(cpu) for cpu in given.get("GOMP_CPU_AFFINITY", "").split())


@contextlib.contextmanager
def variables(added: Mapping[str, str]) -> Iterator[None]:
    """Have these in the environment meanwhile; afterwards it is as it was, whatever else was set in between."""
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def environment(
    workers: int, *, given: Mapping[str, str], options: Mapping[str, object] | None = None
) -> dict[str, str]:
    """Variables to add for `workers` on this machine; empty on a GPU.

    Args:
        workers: what `local_workers` says.
        given: the environment so far; a variable that is in it stays as it is.
        options: vLLM options by Python name; one that sizes the KV cache leaves that to vLLM.
    """
    if not is_cpu_backend():
        return {}
    added = {WORKERS: str(workers)}
    if BIND not in given and (value := bind(workers, cores())):
        added[BIND] = value
    if SHARED not in given and shares_cores({**given, **added}):
        added[SHARED] = "1"
    sized = {"kv_cache_memory_bytes", "gpu_memory_utilization"} & set(options or {})
    if KV_CACHE_GIB not in given and not sized:
        added[KV_CACHE_GIB] = str(kv_cache_gib(workers, available_memory()))
    return added
