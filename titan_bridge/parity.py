"""The referee: log-probabilities of the engine against transformers and against TorchTitan's own forward pass.

The engine continues fixed prompts greedily; both references then read the same tokens in one piece, in
float32. Prompts have unequal lengths, share prefixes, are prefilled in chunks, and each runs twice, the second
time out of the prefix cache, so that a fault in any of these shows as a number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # heavy, and imported below while the engine's processes start
    import torch

PROMPT_LENGTHS = (3, 17, 40, 65, 97, 128, 161, 190)
"""Tokens of the prompts; those longer than `SHARED` begin alike."""
SHARED = 64
NEW_TOKENS = 64
ENGINE_OPTIONS = {
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "block_size": 32,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 128,
}
"""vLLM options that make every prompt over 64 tokens a chunked one and the second round hit the prefix cache, which has
room for all of them and no more: a cache of gigabytes takes ten seconds to clear on a CPU."""
LONGEST = max(PROMPT_LENGTHS) + NEW_TOKENS
"""Tokens of the longest sequence."""

Logprobs = Callable[[Sequence[int]], "torch.Tensor"]
"""Token ids of a sequence of L tokens -> float32 log-probabilities `(L, V)`; row i is about token i + 1."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Engine against one reference; log-probabilities are natural logarithms."""

    reference: str
    tokens: int
    """Log-probabilities compared, prompt tokens included."""
    max: float | None
    """Largest |difference|; None where a log-probability is not finite."""
    mean: float | None
    """Mean |difference|; None where a log-probability is not finite."""
    diverged: str | None
    """The first greedy token that the reference would not have taken; None if there is none."""
    not_finite: str | None
    """The first token with a log-probability that is NaN or infinite, and on which side; None if there is none."""

    def holds(self, tolerance: float | None, *, greedy: bool) -> bool:
        """Whether every number is finite and within `tolerance` (None: any), and with `greedy` every token the same."""
        if self.not_finite is not None or (greedy and self.diverged is not None):
            return False
        return tolerance is None or (self.max is not None and self.max <= tolerance)


def prompts(vocab_size: int, *, max_model_len: int | None = None) -> list[list[int]]:
    """The fixed prompts for a vocabulary, cut so that `NEW_TOKENS` more fit into `max_model_len`."""
    import torch  # noqa: PLC0415

    generator = torch.Generator().manual_seed(20)
    shared = torch.randint(vocab_size, (SHARED,), generator=generator).tolist()
    room = (max_model_len or 10**9) - NEW_TOKENS
    result = []
    for length in PROMPT_LENGTHS:
        own = torch.randint(vocab_size, (length,), generator=generator).tolist()
        result.append(([*shared, *own[SHARED:]] if length > SHARED else own)[: max(1, room)])
    return result


def rounds(prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Prompts and sampling parameters for the engine: each prompt twice, the second time from the prefix cache.

    vLLM computes prompt log-probabilities only for prompts that it does not take from the cache.
    """
    greedy = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": 0}
    sampling = [{**greedy, "prompt_logprobs": 0} for _ in prompts] + [dict(greedy) for _ in prompts]
    return [list(prompt) for prompt in (*prompts, *prompts)], sampling


def references(
    model: str | os.PathLike[str], step: int | None = None, names: str | None = None
) -> Iterator[tuple[str, Logprobs]]:
    """Name and log-probabilities of each reference, float32 on the CPU; one is in memory at a time.

    transformers reads Hugging Face checkpoints of models that it knows, quantized ones only with packages that nothing
    else here needs; all have TorchTitan's own forward as referee.
    """
    from titan_bridge.checkpoint.hf import is_hf  # noqa: PLC0415
    from titan_bridge.checkpoint.model_dir import weights_directory  # noqa: PLC0415
    from titan_bridge.models import family_for, load_hf_config, quantization  # noqa: PLC0415
    from titan_bridge.reference import load_reference  # noqa: PLC0415

    hf = load_hf_config(model)
    known = family_for(hf).config_class is None and quantization.read(hf) is None
    if known and names is None and weights_directory(str(model), step) == Path(model) and is_hf(Path(model)):
        yield "transformers", _transformers(model)
    yield "TorchTitan", load_reference(model, step=step, names=names).logprobs


def _transformers(model: str | os.PathLike[str]) -> Logprobs:
    import torch  # noqa: PLC0415

    # A heavy import that the other reference does without.
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.no_grad()
    def logprobs(token_ids: Sequence[int]) -> torch.Tensor:
        return loaded(torch.tensor([list(token_ids)])).logits[0].float().log_softmax(-1)

    return logprobs


def compare(completions: Sequence[Mapping[str, Any]], name: str, logprobs: Logprobs) -> Difference:
    """Hold an engine's completions against one reference.

    Args:
        completions: With the fields `prompt_token_ids`, `token_ids`, `logprobs` and `prompt_logprobs` (or None)
            of `engine.offline.Completion`.
        name: Of the reference.
        logprobs: Of the reference.
    """
    differences: list[float] = []
    diverged = not_finite = None
    known: dict[tuple[int, ...], torch.Tensor] = {}
    for index, completion in enumerate(completions):
        prompt, new = list(completion["prompt_token_ids"]), list(completion["token_ids"])
        key = (*prompt, *new)
        if key not in known:
            known[key] = logprobs(key)
        expected_LV = known[key]
        of_prompt = completion["prompt_logprobs"] or [None] * len(prompt)
        for position, value in enumerate([*of_prompt, *completion["logprobs"]]):
            if value is None:
                continue
            expected = expected_LV[position - 1, key[position]].item()
            if not_finite is None and not (math.isfinite(value) and math.isfinite(expected)):
                not_finite = (
                    f"prompt {index} ({len(prompt)} tokens), position {position}, token {key[position]}: "
                    f"the engine says {value}, {name} {expected}"
                )
            differences.append(abs(value - expected))
        if diverged is None:
            best = expected_LV[len(prompt) - 1 : len(key) - 1].argmax(-1).tolist()
            wrong = next(
                (i for i, pair in enumerate(zip(new, best, strict=True)) if pair[0] != pair[1]), None
            )
            if wrong is not None:
                diverged = f"prompt {index} ({len(prompt)} tokens), new token {wrong}: {new[wrong]}, not {best[wrong]}"
    known_all = not_finite is None and differences
    return Difference(
        reference=name,
        tokens=len(differences),
        max=max(differences) if known_all else None,
        mean=sum(differences) / len(differences) if known_all else None,
        diverged=diverged,
        not_finite=not_finite,
    )
