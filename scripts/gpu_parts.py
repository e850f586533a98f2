"""Parts of `gpu_check.sh` that are no command of titan-bridge: `python scripts/gpu_parts.py PART MODELS cuda|cpu`.

The last line is a JSON object; exit code 0 if what was found is right.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")

PROMPT = [(7 * i + 3) % 200 for i in range(40)]
KV_BYTES = 64 << 20
EXPERTS, DIM, HIDDEN, TOP_K = 8, 128, 64, 2


def engine(model: Path, **options: Any) -> Any:
    """vLLM's `LLM` with our class, small enough to have two on one machine."""
    from vllm import LLM  # noqa: PLC0415  the parts for operators do without an engine

    given = {
        "model_impl": "torchtitan", "max_model_len": 256, "max_num_seqs": 4, "kv_cache_memory_bytes": KV_BYTES,
        "skip_tokenizer_init": True, "worker_extension_cls": "titan_bridge.engine.run.worker.BridgeWorker",
    }  # fmt: skip
    llm = LLM(str(model), **{**given, **options})
    loaded = {worker["model_class"] for worker in llm.collective_rpc("bridge_report")}
    ours = options.get("model_impl", "torchtitan") == "torchtitan"
    if any(name.startswith("titan_bridge.") != ours for name in loaded):
        raise SystemExit(f"{loaded} was served")
    return llm


def logprobs(llm: Any) -> list[float]:
    """Of 16 greedy tokens and of the prompt."""
    from vllm import SamplingParams  # noqa: PLC0415

    llm.reset_prefix_cache()
    sampling = SamplingParams(max_tokens=16, temperature=0, prompt_logprobs=0, logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    answer = output.outputs[0]
    rows = [*output.prompt_logprobs[1:], *answer.logprobs]
    tokens = [*PROMPT[1:], *answer.token_ids]
    return [row[token].logprob for row, token in zip(rows, tokens, strict=True)]


def farthest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def operators(models: Path, device: str) -> dict[str, Any]:
    """The grouped product without rows, and the operator of routed experts by each kernel: replayed on a GPU."""
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415
    from torchtitan.models.common.moe import RoutedExperts  # noqa: PLC0415
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # noqa: PLC0415
    from vllm.config import VllmConfig, set_current_vllm_config  # noqa: PLC0415
    from vllm.forward_context import set_forward_context  # noqa: PLC0415

    from titan_bridge.engine.model.moe import ServedExperts, TopKSumDispatcher  # noqa: PLC0415
    from titan_bridge.engine.model.triton_experts import use_triton  # noqa: PLC0415
    from titan_bridge.models.experts import KeepDtypeGroupedExperts  # noqa: PLC0415

    torch.manual_seed(0)
    none = torch._grouped_mm(
        torch.empty(0, DIM, dtype=torch.bfloat16, device=device),
        torch.empty(EXPERTS, DIM, HIDDEN, dtype=torch.bfloat16, device=device),
        offs=torch.zeros(EXPERTS, dtype=torch.int32, device=device),
    )
    assert none.shape == (0, HIDDEN)
    inner = KeepDtypeGroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS)
    dispatcher = LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K)
    held = RoutedExperts.Config(inner_experts=inner, token_dispatcher=dispatcher).build()
    for parameter in held.parameters():
        nn.init.normal_(parameter, std=0.1)
    held.token_dispatcher.__class__ = TopKSumDispatcher
    config = VllmConfig()
    with set_current_vllm_config(config):
        compilation = config.compilation_config
        served = ServedExperts(
            held, name="a", layer_id=0, token_share=None, outside_graphs=False, compilation=compilation
        )
    x_TD = torch.randn(40, DIM)
    scores_TK, ids_TK = torch.rand(40, EXPERTS).topk(TOP_K)
    with torch.inference_mode(), set_forward_context(None, config):
        wanted_TD = served.run(x_TD, scores_TK, ids_TK, torch.bincount(ids_TK.flatten(), minlength=EXPERTS))
        held.to(device, torch.bfloat16)
        own = device == "cuda" and torch.cuda.get_device_capability()[0] in (9, 10)
        kernels = {"torch": own, "triton": True} if device == "cuda" else {"torch": False}
        found = {}
        for kernel, captures in kernels.items():
            if kernel == "triton":
                use_triton(held.inner_experts, routes=True)
            out_TD = _step(x_TD, scores_TK, ids_TK, device, captures=captures)
            difference_TD = (out_TD.cpu().float() - wanted_TD).abs() / wanted_TD.abs().max()
            if not (worst := difference_TD.max().item()) < 0.03:
                raise SystemExit(f"routed experts ({kernel}) differ by {worst:.1e} of their largest number")
            found[kernel] = {"max": worst, "mean": difference_TD.mean().item()}
    return {**max(found.values(), key=lambda each: each["max"]), "kernels": found}


def _step(x_TD: Any, scores_TK: Any, ids_TK: Any, device: str, *, captures: bool) -> Any:
    """What the operator makes of these; captured with others and replayed with these, if `captures`."""
    import torch  # noqa: PLC0415

    def step(x: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
        counts = torch.nn.functional.one_hot(ids.flatten(), EXPERTS).sum(0)
        torch.ops.vllm.titan_routed_experts(x, scores, ids, counts, out, "a")

    given = [x_TD.to(device, torch.bfloat16), scores_TK.to(device), ids_TK.to(device)]
    out_TD = torch.empty_like(given[0])
    if not captures:
        step(*given, out_TD)
        return out_TD
    placed = [torch.ones_like(each) if each.is_floating_point() else each * 0 for each in given]
    step(*placed, out_TD)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*placed, out_TD)
    for place, value in zip(placed, given, strict=True):
        place.copy_(value)
    graph.replay()
    return out_TD


def sync(models: Path, device: str) -> dict[str, Any]:
    """A step of a model with experts asks the host nothing; vLLM raises if one does."""
    logprobs(engine(models / "qwen3_moe", dtype="bfloat16"))
    return {}


def cache(models: Path, device: str) -> dict[str, Any]:
    """Blocks of the KV cache that a size in bytes has, beside vLLM's own model: at least 95 %."""
    blocks = {}
    for impl in ("torchtitan", "vllm"):
        llm = engine(models / "qwen3_moe", model_impl=impl, enforce_eager=True)
        blocks[impl] = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        llm.llm_engine.engine_core.shutdown()
    if not blocks["torchtitan"] >= 0.95 * blocks["vllm"]:
        raise SystemExit(f"blocks of the cache: {blocks}")
    return {"blocks": blocks}


def sleep(models: Path, device: str) -> dict[str, Any]:
    """Asleep an engine holds almost nothing; awake it has the numbers that it had."""
    import torch  # noqa: PLC0415

    llm = engine(models / "qwen3_moe", dtype="float32", enforce_eager=True, enable_sleep_mode=True)
    before, free = logprobs(llm), torch.cuda.mem_get_info()[0]
    llm.sleep(level=1)
    freed = torch.cuda.mem_get_info()[0] - free
    llm.wake_up()
    worst = farthest(before, logprobs(llm))
    llm.sleep(level=2)
    llm.wake_up()
    llm.collective_rpc("reload_weights")
    worst = max(worst, farthest(before, logprobs(llm)))
    if worst > 1e-4 or freed < KV_BYTES:
        raise SystemExit(f"after sleep log-probabilities differ by {worst:.1e}; {freed} bytes were freed")
    return {"max": worst, "freed_mib": freed >> 20}


def reload(models: Path, device: str) -> dict[str, Any]:
    """Other weights come in place, and the first ones come back."""
    llm = engine(models / "qwen3_moe", dtype="float32", enforce_eager=True)
    first = logprobs(llm)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(models / "other")})
    other = logprobs(llm)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(models / "qwen3_moe")})
    worst = farthest(first, logprobs(llm))
    if worst > 1e-4 or farthest(first, other) < 0.1:
        raise SystemExit(
            f"log-probabilities differ by {worst:.1e}, those of other weights by {farthest(first, other):.1e}"
        )
    return {"max": worst}


PARTS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    each.__name__: each for each in (operators, sync, cache, sleep, reload)
}

if __name__ == "__main__":
    name, folder, where = sys.argv[1:]
    if where == "cpu":
        from titan_bridge import cpu

        os.environ.update(cpu.environment(1, given=os.environ))
    began = time.monotonic()
    found = PARTS[name](Path(folder), where)
    print(json.dumps({**found, "seconds_inside": round(time.monotonic() - began, 1)}), flush=True)
