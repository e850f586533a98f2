"""Attention data parallelism beside plain tp and beside attention that is replicated: cache tokens and throughput.

    python scripts/bench_attention_dp.py                          Qwen3 of 40 M parameters at tp=2, bfloat16
    python scripts/bench_attention_dp.py --heads 1 --rounds 1 --json out/attention_dp.json

Each side is an engine, and the three take turns, round by round, since a machine's other work comes and goes. They
have the same bytes of cache on a rank and the same limits for the whole engine: a group gets half of the sequences and
tokens of a step that plain tp has. The cache is small enough that plain tp cannot run all long requests at once. All
requests come at once. Prefill: tokens of prompts a second, one token out; decode: tokens out a second, prompts included
in the time. Medians; ratios are those of attention dp to plain tp, above 1 is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams

from titan_bridge import cpu
from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.engine.cpu import forking
from titan_bridge.engine.run.offline import engine
from titan_bridge.testing import make_checkpoint

SIZES = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 8, "head_dim": 64, "max_position_embeddings": 2048,
}  # fmt: skip
SIDES = {"plain tp": {}, "replicated attention": {"attn_tp": 1}, "attention dp": {"attention_dp": 2}}
LENGTHS = {"short": 32, "long": 512}
REQUESTS, OUTPUT, SEQUENCES, TOKENS = 16, 32, 16, 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--heads", type=int, action="append", help="key-value heads; may be repeated (1 and 2)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement (default 3)")
    parser.add_argument("--cache", type=int, default=8, help="MiB of KV cache on a rank (default 8)")
    parser.add_argument("--models", type=Path, default=Path("out/bench"), help="where the models are made")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    given = parser.parse_args()
    found = {}
    for heads in given.heads or (1, 2):
        model = given.models / f"attention-dp-{heads}"
        if not (model / "config.json").is_file():
            make_checkpoint(
                model, "qwen3", dtype=torch.bfloat16, std=0.02, num_key_value_heads=heads, **SIZES
            )
        sides = measure(model, given.cache << 20, given.rounds)
        found[f"{heads} key-value heads"] = sides
        show(heads, sides)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def config_of(model: Path, parallel: dict[str, int], cache: int) -> InferConfig:
    groups = parallel.get("attention_dp", 1)
    return InferConfig(
        model=str(model),
        dtype="bfloat16",
        max_model_len=LENGTHS["long"] + OUTPUT,
        parallel=Parallel(tp=2, **parallel),
        vllm={
            "enforce_eager": True, "kv_cache_memory_bytes": cache, "max_num_seqs": SEQUENCES // groups,
            "max_num_batched_tokens": TOKENS // groups, "enable_prefix_caching": False,
        },
    )  # fmt: skip


def measure(model: Path, cache: int, rounds: int) -> dict[str, dict[str, float]]:
    """Figures of each side."""
    chance = random.Random(0)
    figures: dict[str, dict[str, float]] = {side: {} for side in SIDES}
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.variables({}))
        llms = {}
        for side, parallel in SIDES.items():
            # vLLM sets it for itself; the next engine would take it for the user's wish, and end the fork server.
            os.environ.pop(forking.METHOD, None)
            llms[side], workers, _ = stack.enter_context(engine(config_of(model, parallel, cache)))
            config: Any = llms[side].llm_engine.vllm_config.cache_config
            figures[side]["cache tokens"] = config.kv_cache_size_tokens
            figures[side]["bytes of weights on a rank"] = max(worker["local_bytes"] for worker in workers)
        for name, length in LENGTHS.items():
            prompts = [
                {"prompt_token_ids": [chance.randrange(SIZES["vocab_size"]) for _ in range(length)]}
                for _ in range(REQUESTS)
            ]
            for what, output, counted in (("prefill", 1, length), ("decode", OUTPUT, OUTPUT)):
                asked = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
                seconds: dict[str, list[float]] = {side: [] for side in SIDES}
                for _ in range(rounds):
                    for side, llm in llms.items():
                        start = time.perf_counter()
                        llm.generate(prompts, asked, use_tqdm=False)
                        seconds[side].append(time.perf_counter() - start)
                for side, took in seconds.items():
                    speed = REQUESTS * counted / statistics.median(took)
                    figures[side][f"{what}, {name} prompts, tokens/s"] = speed
    return figures


def show(heads: int, sides: dict[str, dict[str, float]]) -> None:
    """A Markdown table."""
    print(f"\n| {heads} key-value heads | {' | '.join(sides)} | ratio of attention dp |\n|---|{'---|' * 4}")
    for figure, plain in sides["plain tp"].items():
        values = " | ".join(f"{side[figure]:,.0f}" for side in sides.values())
        print(f"| {figure} | {values} | {sides['attention dp'][figure] / plain:.2f} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
