"""vLLM's offline engine in this process, with the class that it loaded checked.

When `model_impl` is "torchtitan" and a worker loaded anything else, the run fails: vLLM on its own would serve its own
model without a word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from titan_bridge import cpu
from titan_bridge.config.schema import InferConfig
from titan_bridge.engine.cpu import forking
from titan_bridge.engine.run.worker import WORKER_EXTENSION
from titan_bridge.errors import BridgeError

if TYPE_CHECKING:
    from vllm import LLM

Prompt = str | Sequence[int]
"""Text, or token ids."""
Sampling = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Keyword arguments of vLLM's `SamplingParams`, for all prompts or one mapping for each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to one prompt; `logprobs` and `prompt_logprobs` are natural logarithms of the actual tokens."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[float, ...] | None = None
    """One for each of `token_ids`, if sampling asked for logprobs."""
    prompt_logprobs: tuple[float | None, ...] | None = None
    """One for each of `prompt_token_ids`, the first None, if sampling asked for prompt_logprobs."""
    cached_tokens: int = 0
    """Tokens of the prompt that came out of the prefix cache."""


@contextlib.contextmanager
def engine(config: InferConfig) -> Iterator[tuple[LLM, list[dict[str, Any]], float]]:
    """vLLM's `LLM` for one dp rank in this process, with the workers' reports and the seconds that loading took.

    Sets what the CPU backend needs in `os.environ` while the engine starts, checks the loaded class, and at the end
    shuts the engine down. Several may be there at once.
    """
    options = config.engine_options()
    if "worker_extension_cls" in options:
        raise BridgeError("vllm.worker_extension_cls is taken by titan-bridge here; leave it out")
    # Its processes have their own copy. What vLLM sets on the way is not to be the user's wish for the next engine.
    with cpu.variables(cpu.environment(config.parallel.workers, given=os.environ, options=config.vllm)):
        forking.start()  # before vLLM is imported, which takes as long
        import vllm  # noqa: PLC0415  a process that only launches dp ranks does without

        known = {field.name for field in dataclasses.fields(vllm.EngineArgs)}
        if unknown := sorted(set(options) - known):
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise BridgeError(f"vLLM has no engine option {unknown[0]}; {hint}see `vllm serve --help=all`")
        if options.get("speculative_config"):
            options.setdefault("disable_log_stats", False)  # which would leave drafts uncounted
        started = time.perf_counter()
        llm = vllm.LLM(**options, worker_extension_cls=WORKER_EXTENSION)
    try:
        workers = llm.collective_rpc("bridge_report")
        check_class(config.model_impl, workers)
        yield llm, workers, time.perf_counter() - started
    finally:
        llm.llm_engine.engine_core.shutdown()


def check_class(model_impl: str, workers: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a run whose workers loaded different classes, or not ours although "torchtitan" was asked for.

    Raises:
        BridgeError: with what was loaded.
    """
    loaded = sorted({worker["model_class"] for worker in workers})
    if len(loaded) != 1:
        raise BridgeError(f"the workers loaded different classes: {', '.join(loaded)}; all must load one")
    if model_impl == "torchtitan" and not loaded[0].startswith("titan_bridge."):
        raise BridgeError(
            f"model_impl='torchtitan' was asked for, but vLLM loaded {loaded[0]}; run `titan-bridge doctor`"
        )


def complete(llm: LLM, prompts: Sequence[Prompt], sampling: Sampling) -> tuple[list[Completion], float]:
    """Continue the prompts; also the seconds from the first request to the last answer."""
    from vllm import SamplingParams  # noqa: PLC0415  as in engine()

    inputs: list[Any] = [p if isinstance(p, str) else {"prompt_token_ids": list(p)} for p in prompts]
    started = time.perf_counter()
    one = isinstance(sampling, Mapping)
    params = SamplingParams(**sampling) if one else [SamplingParams(**each) for each in sampling]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    return [_completion(output) for output in outputs], seconds


def drafts(llm: LLM) -> dict[str, int] | None:
    """How many tokens speculation has drafted so far, and how many of them were accepted; None without speculation."""
    if llm.llm_engine.vllm_config.speculative_config is None:
        return None
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {
        name: int(counters.get(f"vllm:spec_decode_num_{name}_tokens", 0)) for name in ("draft", "accepted")
    }


def _completion(output: Any) -> Completion:
    answer = output.outputs[0]
    token_ids = tuple(answer.token_ids)
    prompt_token_ids = tuple(output.prompt_token_ids)
    return Completion(
        prompt=output.prompt,
        prompt_token_ids=prompt_token_ids,
        text=answer.text,
        token_ids=token_ids,
        finish_reason=answer.finish_reason,
        logprobs=_chosen(answer.logprobs, token_ids),  # type: ignore[arg-type]  # no None after the prompt
        prompt_logprobs=_chosen(output.prompt_logprobs, prompt_token_ids),
        cached_tokens=output.num_cached_tokens or 0,
    )


def _chosen(table: Any, token_ids: Sequence[int]) -> tuple[float | None, ...] | None:
    if not table:
        return None
    return tuple(
        None if row is None else row[token].logprob for row, token in zip(table, token_ids, strict=True)
    )


def users_mistake(error: BaseException) -> str | None:
    """The message of the BridgeError behind `error`, also where pydantic has wrapped it; None if there is none."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, BridgeError):
            return str(chain)
        if isinstance(chain, ValidationError):
            first = chain.errors()[0]
            if cause := first.get("ctx", {}).get("error"):
                return str(cause)
            return f"{'.'.join(map(str, first['loc']))} = {first['input']!r} is not allowed: {first['msg']}"
        chain = chain.__cause__ or chain.__context__
    return None
