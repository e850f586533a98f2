"""`titan-bridge generate`: continue prompts with the offline engine."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import tyro

from titan_bridge.commands.infer import InferCommand, Int, Number, parse_vllm_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(InferCommand):
    """Continue prompts with vLLM's offline engine, and say which class served them.

    Options that are not listed here go to vLLM's engine; write MODEL first.

    Example: titan-bridge generate out/demo/qwen3_moe --tp 2 --ep 2 --prompt "def main" --enforce-eager
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be repeated. Without it: the prompts of the TOML."""
    max_tokens: Int = None
    """New tokens a prompt."""
    temperature: Number = None
    """0 takes the likeliest token each time."""
    json: bool = False
    """Print one JSON object."""
    verbose: bool = False
    """Show vLLM's log on stderr."""
    vllm_options: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        options = {f"vllm.{key}": value for key, value in parse_vllm_options(self.vllm_options).items()}
        config = self.resolve(
            {
                "generate.prompts": list(self.prompt) or None,
                "generate.max_tokens": self.max_tokens,
                "generate.temperature": self.temperature,
                **options,
            }
        ).config

        from titan_bridge.checks import check
        from titan_bridge.commands.quiet import quiet, warn_of_weights

        with quiet(verbose=self.verbose) as say:
            from titan_bridge.engine.run import ranks

            with ranks.start(config) as started:
                check(config, text=True)  # while they import vLLM
                say(f"importing vLLM to run {config.model}")
                outcome = started.generate()
        if self.json:
            print(json.dumps(dataclasses.asdict(outcome) | {"model_class": outcome.model_class}))
        else:
            for completion in outcome.completions:
                print(f"--- {completion.prompt!r}\n{completion.text}")
            first = outcome.workers[0]
            tokens = sum(len(completion.token_ids) for completion in outcome.completions)
            print("---")
            print(
                f"class   {outcome.model_class}"
                + (f" ({first['inner_class']})" if first["inner_class"] else "")
            )
            if first["sizes"]:
                print("mesh    " + " ".join(f"{axis}={size}" for axis, size in first["sizes"].items()))
            stored = first["loaded"]["dtypes"] if first["loaded"] else [first["dtype"]]
            print(
                f"dtype   {first['dtype']}"
                + (f" (the checkpoint's: {', '.join(stored)})" if list(stored) != [first["dtype"]] else "")
            )
            print(
                f"workers {len(outcome.workers)}, {max(w['local_bytes'] for w in outcome.workers):,} bytes each at most"
            )
            print(
                f"time    {outcome.load_seconds:.1f} s to load, {tokens} tokens in {outcome.generate_seconds:.1f} s"
            )
            if outcome.drafts is not None:
                drafted = outcome.drafts["draft"]
                print(f"drafts  {drafted} tokens, of which {outcome.drafts['accepted']} were accepted")
        warn_of_weights(outcome.workers)
        if outcome.killed_ranks:
            print(
                f"titan-bridge: dp ranks {list(outcome.killed_ranks)} did not end and were killed",
                file=sys.stderr,
            )
            return 1
        return 0
