"""`titan-bridge parity`: hold the engine's numbers against the references."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import TYPE_CHECKING

import tyro

from titan_bridge import cpu
from titan_bridge.commands.infer import InferCommand, Number, parse_vllm_options
from titan_bridge.errors import BridgeError

if TYPE_CHECKING:
    from titan_bridge.config.schema import InferConfig

FLOAT32_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(InferCommand):
    """Compare the engine's log-probabilities with transformers' and TorchTitan's own, token by token.

    Runs in float32 unless --dtype or --set says otherwise; the references are always float32. Exit code 0 if every
    difference is finite and within the tolerance and every greedy token is the reference's, 1 if not.

    Example: titan-bridge parity out/demo/qwen3_moe --tp 2 --ep 2
    """

    tolerance: Number = None
    """Largest |difference| of log-probabilities allowed; 1e-4 in float32, not judged in other types."""
    json: bool = False
    """Print one JSON object."""
    verbose: bool = False
    """Show vLLM's log on stderr."""
    vllm_options: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        from titan_bridge import parity

        tolerance = self.tolerance
        if tolerance is not None and not 0 <= tolerance < math.inf:
            raise BridgeError(f"--tolerance {tolerance}; give a finite number of at least 0")

        config = self.config()
        if tolerance is None and config.dtype == "float32":
            tolerance = FLOAT32_TOLERANCE

        from titan_bridge.checks import check, model_directory
        from titan_bridge.commands.quiet import quiet, warn_of_weights

        hf = model_directory(config.model)
        limit = min(config.max_model_len or 10**9, hf.get("max_position_embeddings") or 10**9, parity.LONGEST)
        asked, config = config, dataclasses.replace(config, max_model_len=limit)
        with quiet(verbose=self.verbose) as say:
            from titan_bridge.engine.run import ranks

            # Else products of Triton's kernels on GPUs are TF32's.
            exact = {"TRITON_F32_DEFAULT": "ieee"} if config.dtype == "float32" else {}
            with cpu.variables({**exact, **os.environ}), ranks.start(config) as started:
                check(asked)  # while they import vLLM
                say(f"importing vLLM to run {config.model}")
                prompts = parity.prompts(hf["vocab_size"], max_model_len=limit)
                outcome = started.generate(*parity.rounds(prompts))
        completions = [dataclasses.asdict(completion) for completion in outcome.completions]
        found = []
        with quiet(verbose=self.verbose) as say:
            titan = config.additional_config().get("titan") or {}
            say("loading the references")
            for name, logprobs in parity.references(config.model, titan.get("step"), titan.get("names")):
                say(f"comparing with {name}")
                found.append(parity.compare(completions, name, logprobs))
        right = all(difference.holds(tolerance, greedy=config.dtype == "float32") for difference in found)
        facts = {
            "holds": right,
            "tolerance": tolerance,
            "dtype": config.dtype,
            "model_class": outcome.model_class,
            "sizes": outcome.workers[0]["sizes"],
            "attention": outcome.workers[0]["attention"],
            "cached_tokens": sum(completion.cached_tokens for completion in outcome.completions),
            "references": [dataclasses.asdict(difference) for difference in found],
        }
        if self.json:
            print(json.dumps(facts, allow_nan=False))
        else:
            _show(facts)
        warn_of_weights(outcome.workers)
        return 0 if right and not outcome.killed_ranks else 1

    def config(self) -> InferConfig:
        """What is served: our options where neither the command line nor the file says another."""
        from titan_bridge import parity

        given = parse_vllm_options(self.vllm_options)
        resolved = self.resolve({f"vllm.{key}": value for key, value in given.items()})
        config = resolved.config
        ours = {**parity.ENGINE_OPTIONS, "enforce_eager": True}
        config = dataclasses.replace(config, vllm={**ours, **config.vllm})
        if resolved.origin.get("dtype") not in ("--dtype", "--set"):  # a file's is what one serves with
            config = dataclasses.replace(config, dtype="float32")
        return config


def _show(facts: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    sizes = " ".join(f"{axis}={size}" for axis, size in (facts["sizes"] or {}).items())
    table = Table(title=f"{facts['model_class']}, {facts['dtype']}, {sizes}", title_justify="left")
    for column in ("reference (fp32)", "tokens", "max |difference|", "mean", "first diverging token"):
        table.add_column(column)
    for row in facts["references"]:
        table.add_row(
            row["reference"],
            f"{row['tokens']:,}",
            *("not finite" if row[which] is None else f"{row[which]:.1e}" for which in ("max", "mean")),
            row["diverged"] or "none",
        )
    console = Console()
    console.print(table)
    if facts["attention"]:
        console.print(f"served with {facts['attention']}")
    for row in facts["references"]:
        if row["not_finite"]:
            console.print(f"NaN or infinity first at {row['not_finite']}", soft_wrap=True)
    judged = "not judged" if facts["tolerance"] is None else f"allowed {facts['tolerance']:.0e}"
    word = "holds" if facts["holds"] else "DOES NOT HOLD"
    console.print(
        f"parity {word} ({judged}); {facts['cached_tokens']:,} prompt tokens came from the prefix cache"
    )
