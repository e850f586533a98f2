"""How fast a fingerprint is, against a plain sum of the same bytes (as int64), on this CPU.

    python scripts/bench_fingerprint.py                 the table
    python scripts/bench_fingerprint.py --mb 2048       larger tensors
    python scripts/bench_fingerprint.py --threads 2     more cores; --json for machines

The two take turns on the same memory; the best of each is compared, since whatever else runs only makes both slower.
"cast": a float32 trainer's tensor, fingerprinted as the bfloat16 that an engine has. "memory": what the fingerprint
added to the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from titan_bridge.fingerprint import fingerprint

WIDTHS = (16384, 4096, 14336, 2880, 1024)
"""Last dims in elements, as weights have them."""


def measure(width: int, dtype: torch.dtype, cast: torch.dtype | None, megabytes: int, repeats: int) -> dict:
    rows = (megabytes << 20) // (width * dtype.itemsize)
    tensor = torch.randn(rows, width).to(dtype)
    words = tensor.view(torch.int64)
    fingerprint(tensor[:8], cast)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours, plain = [], []
    for _ in range(repeats):
        plain.append(seconds(lambda: words.sum().item()))
        ours.append(seconds(lambda: fingerprint(tensor, cast)))
    size = tensor.numel() * tensor.itemsize
    return {
        "shape": list(tensor.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "cast": cast and str(cast).removeprefix("torch."),
        "gigabytes_per_second": size / min(ours) / 1e9,
        "plain_sum_gigabytes_per_second": size / min(plain) / 1e9,
        "ratio": min(plain) / min(ours),
        "memory_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=1024, help="MiB of each tensor")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kinds = [(torch.bfloat16, None), (torch.float32, None), (torch.float32, torch.bfloat16)]
    results = [
        measure(width, dtype, cast, options.mb, options.repeats) for dtype, cast in kinds for width in WIDTHS
    ]
    if options.json:
        print(json.dumps(results, indent=1))
        return
    table = Table(title=f"{options.mb} MiB a tensor, {options.threads} threads, best of {options.repeats}")
    for column in ("shape", "dtype", "GB/s", "plain sum", "ratio", "memory MB"):
        table.add_column(column, justify="right")
    for r in results:
        cast = f" as {r['cast']}" if r["cast"] else ""
        speeds = (r["gigabytes_per_second"], r["plain_sum_gigabytes_per_second"], r["ratio"])
        table.add_row(
            str(r["shape"]), r["dtype"] + cast, *(f"{v:.2f}" for v in speeds), f"{r['memory_mb']:.0f}"
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
