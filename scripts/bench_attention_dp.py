"""Attention data parallelism beside plain tp and beside attention that is replicated: cache tokens and throughput.

    python scripts/bench_attention_dp.py                          Qwen3 of 40 M parameters at tp=2, bfloat16
    python scripts/bench_attention_dp.py --heads 1 --rounds 1 --json out/attention_dp.json
    python scripts/bench_attention_dp.py --soak 600               only: random requests, aborts and weight updates

Each side is one engine in this process, with the same bytes of cache on a rank and the same limits for the whole
engine: a group gets half of the sequences and tokens of a step that plain tp has. All requests come at once. Prefill:
tokens of prompts a second, one token out; decode: tokens out a second, prompts included in the time. Medians; ratios
are to plain tp, above 1 is faster.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm import SamplingParams

from titan_bridge import cpu
from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.engine.run.offline import engine
from titan_bridge.testing import make_checkpoint

SIZES = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 8, "head_dim": 64, "max_position_embeddings": 2048,
}  # fmt: skip
SIDES = {"plain tp": {}, "replicated attention": {"attn_tp": 1}, "attention dp": {"attention_dp": 2}}
LENGTHS = {"short": 32, "long": 512}
REQUESTS, OUTPUT, SEQUENCES, TOKENS = 32, 32, 16, 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--heads", type=int, action="append", help="key-value heads; may be repeated (1 and 2)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement (default 3)")
    parser.add_argument("--cache", type=int, default=24, help="MiB of KV cache on a rank (default 24)")
    parser.add_argument("--models", type=Path, default=Path("out/bench"), help="where the models are made")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument(
        "--soak",
        type=float,
        nargs="?",
        const=60.0,
        metavar="SECONDS",
        help="only run random load for so long (60)",
    )
    given = parser.parse_args()
    found = {}
    for heads in given.heads or (1, 2):
        model = given.models / f"attention-dp-{heads}"
        if not (model / "config.json").is_file():
            make_checkpoint(
                model, "qwen3", dtype=torch.bfloat16, std=0.02, num_key_value_heads=heads, **SIZES
            )
        if given.soak:
            print(json.dumps(soak(model, given.soak, given.cache)))
            continue
        sides = {side: measure(model, parallel, given) for side, parallel in SIDES.items()}
        found[f"{heads} key-value heads"] = sides
        show(heads, sides)
    if given.json and found:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def config_of(model: Path, parallel: dict[str, int], cache: int, **options: Any) -> InferConfig:
    groups = parallel.get("attention_dp", 1)
    return InferConfig(
        model=str(model),
        dtype="bfloat16",
        max_model_len=LENGTHS["long"] + OUTPUT,
        parallel=Parallel(tp=2, **parallel),
        vllm={
            "enforce_eager": True, "kv_cache_memory_bytes": cache << 20, "max_num_seqs": SEQUENCES // groups,
            "max_num_batched_tokens": TOKENS // groups, "enable_prefix_caching": False, **options,
        },
    )  # fmt: skip


def measure(model: Path, parallel: dict[str, int], given: argparse.Namespace) -> dict[str, float]:
    """Figures of one engine."""
    chance, figures = random.Random(0), {}
    with cpu.variables({}), engine(config_of(model, parallel, given.cache)) as (llm, workers, _):
        figures["cache tokens"] = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        figures["weight bytes a rank"] = max(worker["local_bytes"] for worker in workers)
        for name, length in LENGTHS.items():
            prompts = [
                {"prompt_token_ids": [chance.randrange(SIZES["vocab_size"]) for _ in range(length)]}
                for _ in range(REQUESTS)
            ]
            for what, output, counted in (("prefill", 1, length), ("decode", OUTPUT, OUTPUT)):
                asked = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
                llm.generate(prompts[:4], asked, use_tqdm=False)
                seconds = []
                for _ in range(given.rounds):
                    start = time.perf_counter()
                    llm.generate(prompts, asked, use_tqdm=False)
                    seconds.append(time.perf_counter() - start)
                figures[f"{what}, {name} prompts, tokens/s"] = REQUESTS * counted / statistics.median(seconds)
    gc.collect()
    return figures


def show(heads: int, sides: dict[str, dict[str, float]]) -> None:
    """A Markdown table."""
    print(f"\n| {heads} key-value heads | {' | '.join(sides)} | ratio of attention dp |\n|---|{'---|' * 4}")
    for figure, plain in sides["plain tp"].items():
        values = " | ".join(f"{side[figure]:,.0f}" for side in sides.values())
        print(f"| {figure} | {values} | {sides['attention dp'][figure] / plain:.2f} |", flush=True)


def soak(model: Path, seconds: float, cache: int) -> dict[str, Any]:
    """Random requests, a quarter aborted, and the weights loaded anew now and then; raises if one does not end."""
    chance, counts = random.Random(0), {"finished": 0, "aborted": 0, "reloads": 0}
    with cpu.variables({}), engine(config_of(model, {"attention_dp": 2}, cache)) as (llm, _, _):
        core, flying, resident = llm.llm_engine, {}, []
        ends = time.monotonic() + seconds
        reload_at = time.monotonic() + 5
        while time.monotonic() < ends or flying:
            while time.monotonic() < ends and len(flying) < 24:
                name = f"r{sum(counts.values()) + len(flying)}-{chance.random()}"
                prompt = [chance.randrange(SIZES["vocab_size"]) for _ in range(chance.randrange(1, 400))]
                output = chance.randrange(1, 100)
                asked = SamplingParams(max_tokens=output, temperature=0.8, ignore_eos=True)
                core.add_request(name, {"prompt_token_ids": prompt}, asked)
                flying[name] = chance.randrange(1, 60) if chance.random() < 0.25 else 0
            for answer in core.step():
                if answer.finished:
                    del flying[answer.request_id]
                    counts["finished"] += 1
            for name in [name for name, left in flying.items() if left == 1]:
                core.abort_request([name])
                del flying[name]
                counts["aborted"] += 1
            flying = {name: max(left - 1, 0) for name, left in flying.items()}
            if time.monotonic() > reload_at:
                llm.collective_rpc("reload_weights")
                counts["reloads"] += 1
                reload_at = time.monotonic() + 5
                processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
                resident.append(sum(process.memory_info().rss for process in processes))
        assert not core.has_unfinished_requests()
    left = [child for child in psutil.Process().children(recursive=True) if "Worker" in child.name()]
    settled = resident[len(resident) // 4 :]
    return {
        **counts,
        "resident MiB": [size >> 20 for size in (settled[0], settled[-1])],
        "workers left": len(left),
    }


if __name__ == "__main__":
    raise SystemExit(main())
