"""`titan-bridge inspect`: where every parameter of a model would live, from its config.json alone."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from titan_bridge.commands.infer import InferCommand, Int
from titan_bridge.errors import BridgeError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(InferCommand):
    """Show where every parameter of a model lives on dp * tp ranks: mesh, placements, local shapes, bytes a rank.

    Needs config.json only: no weights, no GPU and no second process, at any size. The same layout comes from a
    running engine: `titan_bridge.engine.specs.layout(llm)`, or GET /v1/sharding_spec of `serve --sharding-spec`.

    Example: titan-bridge inspect out/demo/qwen3_moe --dp 2 --tp 2 --ep 4 --picture layout.svg
    """

    rank: Int = None
    """Show the local shapes and bytes of this rank."""
    all: bool = False
    """One row for every parameter, not one for all layers that look alike."""
    picture: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    """Draw it: FILE ends in .svg, .png or .pdf; may be repeated."""
    json: bool = False
    """Print the layout as JSON (with --rank: that rank's rows and the totals)."""

    def run(self) -> int:
        config = self.resolve().config

        import torch  # with what follows, four seconds that a bad flag need not wait for

        from titan_bridge.checks import model_directory

        hf = model_directory(config.model)

        from titan_bridge.layout import layout, stated_dtype
        from titan_bridge.mesh import Sizes
        from titan_bridge.sharding import show

        parallel = config.parallel
        sizes = Sizes(dp=parallel.dp, tp=parallel.tp, ep=parallel.ep)
        if self.rank is not None and not 0 <= self.rank < sizes.world:
            last = sizes.world - 1
            raise BridgeError(f"rank {self.rank} is outside the world of {sizes.world}; allowed: 0 to {last}")
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        found = layout(hf, sizes, parallel.dense, dtype=dtype)
        for file in self.picture:
            from titan_bridge.sharding.picture import layout_picture  # matplotlib

            layout_picture(found, file, title=_title(config.model, hf, sizes, parallel.dense))
        if self.json and self.rank is None:
            print(json.dumps(found.to_json()))
        elif self.json:
            rows = show.rows_of(found, self.rank)
            held = sum(row["rank_bytes"] for row in rows)
            print(
                json.dumps({"rank": self.rank, "rank_bytes": held, **show.totals_of(found), "params": rows})
            )
        else:
            from rich.console import Console

            # Piped into a file or another program, a row stays one line.
            Console(width=None if sys.stdout.isatty() else 200).print(
                show.layout_table(found, self.rank, collapse=not self.all)
            )
            for file in self.picture:
                print(f"picture {file}")
        if config.dtype == "auto" and stated_dtype(hf) in (torch.float32, None):
            print(
                "titan-bridge: shown in float32, as config.json says; vLLM serves such a checkpoint in bfloat16 "
                "unless told --dtype float32",
                file=sys.stderr,
            )
        return 0


def _title(model: str, hf: Mapping[str, Any], sizes: object, dense: str) -> str:
    folder = Path(model).resolve()
    while folder.name == "checkpoint" or folder.name.startswith("step-"):  # of a training run
        folder = folder.parent
    architecture = ", ".join(hf.get("architectures") or ["unknown architecture"])
    numbers = " ".join(f"{axis}={getattr(sizes, axis)}" for axis in ("dp", "tp", "ep"))
    return f"{folder.name} ({architecture}): {numbers}, dense weights {dense}"
