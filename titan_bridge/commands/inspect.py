"""`titan-bridge inspect`: where every parameter of a model would live, from its config.json alone."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from titan_bridge.commands.infer import InferCommand, Int
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import DEGREES

if TYPE_CHECKING:
    from titan_bridge.mesh import Sizes
    from titan_bridge.sharding.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(InferCommand):
    """Show where every parameter of a model lives on dp * tp ranks: mesh, placements, local shapes, bytes a rank.

    Needs config.json only: no weights, no GPU and no second process, at any size. The same layout comes from a
    running engine: `titan_bridge.engine.specs.layout(llm)`, or GET /v1/sharding_spec of `serve --sharding-spec`. For a
    TOML file of `titan-bridge train` it is the trainer's layout.

    Example: titan-bridge inspect out/demo/qwen3_moe --dp 2 --tp 2 --ep 4 --picture layout.svg
    """

    needs_weights = False
    rank: Int = None
    """Show the local shapes and bytes of this rank."""
    all: bool = False
    """One row for every parameter, not one for all layers that look alike."""
    picture: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    """Draw it: FILE ends in .svg, .png or .pdf; may be repeated."""
    json: bool = False
    """Print the layout as JSON (with --rank: that rank's rows and the totals)."""

    def run(self) -> int:
        found, title, note = self._trainer() if _is_train_file(self.model) else self._engine()

        from titan_bridge.sharding import show  # numpy and torch, as what follows

        world = len(found.ranks)
        if self.rank is not None and not 0 <= self.rank < world:
            raise BridgeError(f"rank {self.rank} is outside the world of {world}; allowed: 0 to {world - 1}")
        for file in self.picture:
            from titan_bridge.sharding.picture import layout_picture  # matplotlib

            layout_picture(found, file, title=title)
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
        if note:
            print(f"titan-bridge: {note}", file=sys.stderr)
        return 0

    def _engine(self) -> tuple[Layout, str, str]:
        """Layout, title of the picture, and a remark."""
        config = self.resolve().config

        import torch  # with what follows, four seconds that a bad flag need not wait for

        from titan_bridge.checks import model_directory

        hf = model_directory(config.model)

        from titan_bridge.model_layout import layout, stated_dtype

        parallel = config.parallel
        sizes = parallel.sizes
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        note = ""
        if config.dtype == "auto" and stated_dtype(hf) in (torch.float32, None):
            note = (
                "shown in float32, as config.json says; vLLM serves such a checkpoint in bfloat16 unless told "
                "--dtype float32"
            )
        title = _title(config.model, hf, sizes, parallel.dense)
        return layout(hf, sizes, parallel.dense, dtype=dtype), title, note

    def _trainer(self) -> tuple[Layout, str, str]:
        from titan_bridge.commands.train import job_of

        for flag in ("dense", "dtype", "max_model_len"):
            if getattr(self, flag) is not None:
                name = flag.replace("_", "-")
                raise BridgeError(
                    f"--{name} is for an engine; {self.model} is a file for `titan-bridge train`"
                )
        flags = {f"parallel.{axis}": getattr(self, axis) for axis in DEGREES}
        job = job_of(self.model, self.set, flags)
        return job.layout(), _title(self.model, job.hf_config, job.sizes, "shard"), ""


def _is_train_file(model: str) -> bool:
    """Whether it is a TOML file whose [model] is a table."""
    if not model.endswith(".toml"):
        return False
    from titan_bridge.config.reader import read_toml  # pydantic and tomli, not needed for --help

    return isinstance(read_toml(Path(model)).get("model"), dict)


def _title(model: str, hf: Mapping[str, Any], sizes: Sizes, dense: str) -> str:
    folder = Path(model).resolve()
    while folder.name == "checkpoint" or folder.name.startswith("step-"):  # of a training run
        folder = folder.parent
    architecture = ", ".join(hf.get("architectures") or ["unknown architecture"])
    numbers = " ".join(f"{name}={size}" for name, size in sizes.degrees.items())
    return f"{folder.name} ({architecture}): {numbers}, dense weights {dense}"
