"""What `titan-bridge parity` makes of log-probabilities that are not finite."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from titan_bridge.commands.parity import Parity
from titan_bridge.parity import compare

TABLE_LV = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
PROMPT = (3, 1, 4)


def reference(token_ids: Any) -> torch.Tensor:
    """Log-probabilities of a model in which a token depends on the one before it alone."""
    return TABLE_LV[list(token_ids)]


def greedy() -> dict[str, Any]:
    """What an engine with the reference's own numbers answers to `PROMPT`."""
    tokens = list(PROMPT)
    for _ in range(4):
        tokens.append(int(TABLE_LV[tokens[-1]].argmax()))
    logprobs = [TABLE_LV[a, b].item() for a, b in pairwise(tokens)]
    return {
        "prompt_token_ids": PROMPT,
        "token_ids": tokens[3:],
        "prompt_logprobs": (None, *logprobs[:2]),
        "logprobs": tuple(logprobs[2:]),
    }


def test_equal_numbers_hold() -> None:
    found = compare([greedy(), greedy()], "ref", reference)
    assert found == replace(found, tokens=12, max=0.0, mean=0.0, diverged=None, not_finite=None)
    assert found.holds(0.0, greedy=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("tolerance", [None, 1e9], ids=str)
def test_what_is_not_finite_in_the_engine_fails_and_is_named(bad: float, tolerance: float | None) -> None:
    wrong = greedy()
    wrong["prompt_logprobs"] = (*wrong["prompt_logprobs"][:2], bad)
    wrong["logprobs"] = (bad, *wrong["logprobs"][1:])
    found = compare([greedy(), wrong], "ref", reference)
    assert not found.holds(tolerance, greedy=False)
    expected = TABLE_LV[1, 4].item()
    assert found.not_finite == (
        f"prompt 1 (3 tokens), position 2, token 4: the engine says {bad}, ref {expected}"
    )
    assert found.tokens == 12
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["max"] is None


def test_a_reference_that_is_nan_fails_and_is_named() -> None:
    found = compare([greedy()], "ref", lambda ids: reference(ids) * math.nan)
    assert not found.holds(None, greedy=False)
    assert found.not_finite is not None
    assert found.not_finite.startswith("prompt 0 (3 tokens), position 1, token 1: the engine says -")
    assert found.not_finite.endswith(", ref nan")


def test_what_the_user_says_beats_the_options_of_parity(tmp_path):
    folder = str(tmp_path)
    plain = Parity(model=folder).config()
    assert (plain.dtype, plain.vllm["max_num_seqs"], plain.vllm["enforce_eager"]) == ("float32", 4, True)
    asked = Parity(
        model=folder, set=("vllm.max_num_seqs=8", 'dtype="bfloat16"', "vllm.enforce-eager=false")
    ).config()
    assert (asked.dtype, asked.vllm["max_num_seqs"], asked.vllm["enforce_eager"]) == ("bfloat16", 8, False)
    file = tmp_path / "a.toml"
    file.write_text(f'model = "{folder}"\ndtype = "bfloat16"\n[vllm]\nblock_size = 16\n')
    told = Parity(model=str(file), vllm_options=("--max-num-seqs", "2")).config()
    assert (told.dtype, told.vllm["block_size"], told.vllm["max_num_seqs"]) == ("float32", 16, 2)
