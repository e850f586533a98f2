"""`titan-bridge plan`: what would travel from one layout to another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from titan_bridge.errors import BridgeError

if TYPE_CHECKING:
    from titan_bridge.sharding.layout import Layout
    from titan_bridge.sharding.plan import Plan as Made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Plan the copies from SRC to DST: bytes by tensor group and by pair of ranks, lower bound, balance.

    SRC is a layout file (`titan-bridge inspect MODEL ... --json > file.json`) or a checkpoint directory in any
    format; DST is a layout file.

    Example: titan-bridge plan out/demo/qwen3_moe serve.json --picture traffic.svg
    """

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Layout JSON, or a directory with a checkpoint (and config.json)."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Layout JSON."""
    colocated: bool = False
    """Rank r of both sides is one process: what it holds already does not travel."""
    pairs: int = 10
    """How many of the busiest pairs to show."""
    picture: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    """Draw the traffic matrix: FILE ends in .svg, .png or .pdf; may be repeated."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        if self.dst.is_dir():
            raise BridgeError(
                f"{self.dst} is a directory; DST is a layout file, from `titan-bridge inspect --json`"
            )

        from titan_bridge.sharding import show  # numpy and torch, not needed for --help
        from titan_bridge.sharding.layout import Layout
        from titan_bridge.sharding.plan import plan

        destination = Layout.read(self.dst)
        if self.src.is_dir():
            made = _from_checkpoint(self.src, destination)
        else:
            made = plan(Layout.read(self.src), destination, colocated=self.colocated)
        for file in self.picture:
            from titan_bridge.sharding.picture import traffic_picture  # matplotlib

            traffic_picture(made, file, title=f"{self.src} to {self.dst}")
        if self.json:
            print(json.dumps(show.plan_summary(made, pairs=self.pairs)))
            return 0
        from rich.console import Console

        for table in show.plan_tables(made, pairs=self.pairs):
            Console().print(table)
        return 0


def _from_checkpoint(directory: Path, destination: Layout) -> Made:
    from titan_bridge.checkpoint import open_checkpoint
    from titan_bridge.checkpoint.mapping import make_mapping
    from titan_bridge.checks import model_directory
    from titan_bridge.models import family_for
    from titan_bridge.sharding.plan import plan

    home = directory if (directory / "config.json").is_file() else directory.parent
    hf: dict[str, Any] = model_directory(str(home))
    family = family_for(hf)
    embedding = destination.params.get("tok_embeddings.weight")
    rows = hf["vocab_size"] if embedding is None else embedding.shape[0]
    with open_checkpoint(directory) as checkpoint:
        mapping = make_mapping(checkpoint, family, hf, "engine", dtype=None, buffers={}, padded_vocab=rows)
        return plan(checkpoint.held(), destination, mapping.views, allow_missing=True)
