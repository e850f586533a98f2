"""Continue every line of a file in one batch, without a server.

    python scripts/examples/offline_batch.py DIR prompts.txt answers.jsonl --tp 2

Writes one JSON line for each prompt, in their order.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a folder in Hugging Face format, a training run, or one step of it")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 for float32 weights, too")
    parser.add_argument("--max-tokens", type=int, default=32)
    given = parser.parse_args()

    prompts = given.prompts.read_text().splitlines()
    llm = LLM(
        given.model,
        model_impl="torchtitan",
        tensor_parallel_size=given.tp,
        dtype=given.dtype,
        enforce_eager=True,  # a short batch does not earn back what compiling costs
    )
    # vLLM batches them itself: hand over all at once.
    sampling = SamplingParams(max_tokens=given.max_tokens, temperature=0, logprobs=0)
    answers = [(output.prompt, output.outputs[0]) for output in llm.generate(prompts, sampling)]

    new = given.answers.with_suffix(".new")
    with new.open("w") as file:
        for prompt, answer in answers:
            line = {"prompt": prompt, "text": answer.text, "tokens": list(answer.token_ids)}
            file.write(json.dumps(line | {"logprob": answer.cumulative_logprob}) + "\n")
    os.replace(new, given.answers)  # a reader sees all of it or nothing


if __name__ == "__main__":  # workers import this file again
    main()
