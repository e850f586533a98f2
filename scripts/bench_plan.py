"""How long the planner takes for a mixture-of-experts model of 1 T parameters, from 16 to 4,096 trainer ranks.

    python scripts/bench_plan.py                 the table
    python scripts/bench_plan.py --ranks 256     one size
    python scripts/bench_plan.py --json          for machines

"lower bound": the bytes that travel are what the destinations lack. "floor": what no choice among replicas can
go below, because a pipeline stage with more layers has more to send. The trainer uses HSDP x TP x EP x PP, the
inference side half as many ranks with dp x tp and ep = dp * tp. Each size runs in a process of its own, so that
peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.plan import plan
from titan_bridge.sharding.spec import ShardingSpec, placement_from_str

LAYERS, EXPERTS, DIM, HIDDEN, VOCAB, HEAD_DIM, HEADS, KV_HEADS = 61, 384, 7168, 2048, 163_840, 128, 64, 8
REPEATS = 3


def param(mesh: str, shape: tuple[int, ...], placements: list[str]) -> ParamLayout:
    spec = ShardingSpec(mesh=mesh, placements=tuple(map(placement_from_str, placements)))
    return ParamLayout(spec=spec, shape=shape, dtype="bfloat16")


def model(*, pp: int, replicas: int, fsdp: int, tp: int, ep: int, shard: bool) -> Layout:
    """The layout of the model; `shard`: dense weights sharded over fsdp, as a trainer has them."""
    stage = replicas * fsdp * tp
    efsdp = fsdp * tp // ep
    meshes, params = {}, {}
    for s in range(pp):
        ranks = range(s * stage, (s + 1) * stage)
        meshes[f"dense{s}"] = MeshLayout.make(("dp_replicate", "fsdp", "tp"), (replicas, fsdp, tp), ranks)
        meshes[f"sparse{s}"] = MeshLayout.make(("dp_replicate", "efsdp", "ep"), (replicas, efsdp, ep), ranks)

    row = ["R", "S(0)", "S(1)"] if shard else ["R", "R", "S(1)"]
    whole = ["R", "S(0)", "R"] if shard else ["R", "R", "R"]
    column = (["R", f"SS(0,{tp})", "S(0)"] if tp > 1 else whole) if shard else ["R", "R", "S(0)"]
    # More efsdp ranks than local experts: TorchTitan shards dim 1 of the experts.
    expert = ["R", "S(1)" if shard and efsdp > 1 else "R", "S(0)"]

    params["tok_embeddings.weight"] = param("dense0", (VOCAB, DIM), column)
    for i in range(LAYERS):
        dense, sparse, name = f"dense{i * pp // LAYERS}", f"sparse{i * pp // LAYERS}", f"layers.{i}"
        attention = {
            "attention.qkv_linear.wqkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM),
            "moe.shared_experts.w1": (HIDDEN, DIM),
            "moe.shared_experts.w3": (HIDDEN, DIM),
        }
        params |= {f"{name}.{part}.weight": param(dense, shape, column) for part, shape in attention.items()}
        rows = {"attention.wo": (DIM, HEADS * HEAD_DIM), "moe.shared_experts.w2": (DIM, HIDDEN)}
        params |= {f"{name}.{part}.weight": param(dense, shape, row) for part, shape in rows.items()}
        norms = {"attention_norm": DIM, "ffn_norm": DIM, "q_norm": HEAD_DIM, "k_norm": HEAD_DIM}
        params |= {f"{name}.{part}.weight": param(dense, (size,), whole) for part, size in norms.items()}
        params[f"{name}.moe.router.gate.weight"] = param(dense, (EXPERTS, DIM), whole)
        params[f"{name}.moe.expert_bias"] = param(dense, (EXPERTS,), ["R", "R", "R"])
        grouped = {"w1_EFD": (HIDDEN, DIM), "w2_EDF": (DIM, HIDDEN), "w3_EFD": (HIDDEN, DIM)}
        for part, shape in grouped.items():
            params[f"{name}.moe.experts.{part}"] = param(sparse, (EXPERTS, *shape), expert)
    params["norm.weight"] = param(f"dense{pp - 1}", (DIM,), whole)
    params["output.weight"] = param(f"dense{pp - 1}", (VOCAB, DIM), column)
    return Layout(meshes=meshes, params=params)


def layouts(ranks: int) -> tuple[Layout, Layout, str]:
    """Trainer and inference layout for a number of trainer ranks, and both in words."""
    tp, pp, replicas = min(8, ranks // 4), 1 if ranks < 64 else 4 if ranks < 1024 else 8, 2
    fsdp = ranks // (tp * pp * replicas)
    ep = math.gcd(fsdp * tp, EXPERTS)
    source = model(pp=pp, replicas=replicas, fsdp=fsdp, tp=tp, ep=min(ep, 32), shard=True)
    there = ranks // 2
    tp_there = min(8, there)
    # With more ranks than experts divide, ep is the largest divisor, and the rest are replicas of the experts.
    dp = there // tp_there
    destination = model(
        pp=1, replicas=1, fsdp=dp, tp=tp_there, ep=math.gcd(dp * tp_there, EXPERTS), shard=False
    )
    words = f"{replicas} x fsdp {fsdp} x tp {tp} x pp {pp}, ep {min(ep, 32)} -> dp {dp} x tp {tp_there}"
    return source, destination, words


def measure(ranks: int) -> dict:
    source, destination, words = layouts(ranks)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()  # of this process: others may use the machine
        result = plan(source, destination)
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    own = sum(1 for _ in result.copies(destination=0))
    return {
        "trainer_ranks": ranks,
        "inference_ranks": ranks // 2,
        "layout": words,
        "parameters": sum(math.prod(p.shape) for p in source.params.values()),
        "seconds": statistics.median(seconds),
        "seconds_first": seconds[0],
        "seconds_all": seconds,
        "peak_mb": peak,
        "planner_mb": peak - before,
        "copies": result.copies_count,
        "terabytes": result.bytes / 1e12,
        "at_lower_bound": result.bytes == result.lower_bound,
        "balance": result.balance,
        "balance_floor": result.balance_floor,
        "copies_of_rank_0": own,
        "seconds_to_write_out_rank_0": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    options = parser.parse_args()
    if options.here:
        print(json.dumps([measure(ranks) for ranks in options.ranks], indent=1))
        return
    results = []
    for ranks in options.ranks:
        command = [sys.executable, __file__, "--here", "--ranks", str(ranks)]
        results += json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if options.json:
        print(json.dumps(results, indent=1))
        return
    table = Table(title=f"{results[0]['parameters'] / 1e12:.2f} T parameters, median of {REPEATS} runs")
    columns = {
        "trainer": lambda r: f"{r['trainer_ranks']:,}",
        "inference": lambda r: f"{r['inference_ranks']:,}",
        "layout": lambda r: r["layout"],
        "s": lambda r: f"{r['seconds']:.3f}",
        "first s": lambda r: f"{r['seconds_first']:.3f}",
        "peak MB": lambda r: f"{r['peak_mb']:.0f}",
        "plan MB": lambda r: f"{r['planner_mb']:.0f}",
        "copies": lambda r: f"{r['copies']:,}",
        "µs each": lambda r: f"{r['seconds'] / r['copies'] * 1e6:.2f}",
        "TB": lambda r: f"{r['terabytes']:.2f}",
        "lower bound": lambda r: "met" if r["at_lower_bound"] else "MISSED",
        "max/mean sent": lambda r: f"{r['balance']:.3f}",
        "floor": lambda r: f"{r['balance_floor']:.3f}",
    }
    for name in columns:
        table.add_column(name, justify="left" if name == "layout" else "right")
    for r in results:
        table.add_row(*(cell(r) for cell in columns.values()))
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
