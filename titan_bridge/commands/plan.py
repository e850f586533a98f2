"""`titan-bridge plan`: what would travel from one layout to another."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from titan_bridge.commands.infer import Text
from titan_bridge.errors import BridgeError

if TYPE_CHECKING:
    from titan_bridge.mesh import Sizes
    from titan_bridge.policy.schema import Policy
    from titan_bridge.sharding.layout import Layout
    from titan_bridge.sharding.plan import Plan

_SIDE = (
    "give a layout file (`titan-bridge inspect MODEL --json > FILE`), sizes such as tp=2,ep=2, or a TOML file of "
    "`titan-bridge train`"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Plan the copies from SRC to DST: bytes by tensor group and by pair of ranks, lower bound, balance.

    A side is a layout file (`titan-bridge inspect MODEL ... --json > file.json`), sizes of an engine (`tp=2,ep=2`,
    `dp=2,dense=shard`, `tp=4,attn_tp=2`, `tp=4,policy=FILE`), or a TOML file of `titan-bridge train`, which means
    its trainer. SRC may also be a checkpoint: a model folder in any format, a training run, or one step of it.

    Example: titan-bridge plan configs/train/qwen3_moe_ep2.toml tp=2,ep=2 --picture traffic.svg
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Checkpoint, layout file, sizes or train TOML."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Layout file, sizes or train TOML."""
    model: Text = None
    """Where sizes are given and SRC is no checkpoint or train TOML: the folder of the model."""
    colocated: bool = False
    """Rank r of both sides is one process: what it holds already does not travel."""
    pairs: int = 10
    """How many of the busiest pairs to show."""
    picture: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    """Draw the traffic matrix: FILE ends in .svg, .png or .pdf; may be repeated."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        if "=" not in self.src and not Path(self.src).exists():
            raise BridgeError(
                f"SRC {self.src} does not exist; give a checkpoint, or {_SIDE.removeprefix('give ')}"
            )
        if self.colocated and Path(self.src).is_dir():
            raise BridgeError(f"--colocated is for two sides of ranks; SRC {self.src} is a checkpoint")
        if self.pairs < 0:
            raise BridgeError(f"--pairs {self.pairs}; give at least 0")
        if Path(self.dst).is_dir():
            raise BridgeError(f"DST {self.dst} is a directory; {_SIDE}")

        from titan_bridge.sharding import show  # numpy and torch, not needed for --help
        from titan_bridge.sharding.plan import padding_views, plan

        destination = self._layout(self.dst)
        if Path(self.src).is_dir():
            made = _from_checkpoint(self.src, destination)
        else:
            source = self._layout(self.src)
            views = padding_views(source, destination)
            made = plan(source, destination, views, colocated=self.colocated, allow_missing=bool(views))
            if lost := sorted(made.missing.keys() - {view.fqn for view in views}):
                raise BridgeError(f"{self.dst}: {lost[0]} is in no tensor of {self.src}")
        for file in self.picture:
            from titan_bridge.sharding.picture import picture  # matplotlib

            picture(made, file, title=f"{self.src} to {self.dst}")
        if self.json:
            print(json.dumps(show.plan_summary(made, pairs=self.pairs)))
            return 0
        from rich.console import Console

        for table in show.plan_tables(made, pairs=self.pairs):
            Console().print(table)
        return 0

    def _layout(self, side: str) -> Layout:
        from titan_bridge.model_layout import layout  # torchtitan, which layout files do without
        from titan_bridge.sharding.layout import Layout

        if side.endswith(".toml"):
            return _trainer(side).layout()
        if "=" not in side:
            return Layout.read(Path(side))
        sizes, dense, policy = parse_sizes(side)
        if self.model is None and self.src.endswith(".toml"):
            job = _trainer(self.src)
            staged = _staged(sizes, job.hf_config)
            return layout(job.hf_config, staged, dense, expert_bias=job.expert_bias, policy=policy)
        model = self.model or self.src
        if not Path(model).is_dir():
            raise BridgeError(f"{side} are sizes of which model? give its folder with --model")

        from titan_bridge.checkpoint.model_dir import has_expert_bias

        hf = _config_of(model)
        return layout(hf, _staged(sizes, hf), dense, expert_bias=has_expert_bias(model), policy=policy)


def parse_sizes(text: str) -> tuple[Sizes, Any, Policy]:
    """`"tp=2,ep=2"` -> sizes, how dense weights lie over dp, and how each layer is split.

    Raises:
        BridgeError: another key, a value that is no number, or sizes that do not go together.
    """
    from titan_bridge.mesh import DEGREES, Sizes
    from titan_bridge.policy.read import policy_of_flags  # yaml

    given = {key: value for key, _, value in (part.partition("=") for part in text.split(","))}
    numbers = {key: int(value) for key, value in given.items() if re.fullmatch("[0-9]{1,9}", value)}
    degrees: dict[str, Any] = {key: numbers[key] for key in DEGREES if key in numbers}
    others = {
        "dense": given.get("dense") in ("replicate", "shard"),
        "attn_tp": "attn_tp" in numbers,
        "policy": True,
    }
    bad = [key for key in given if key not in degrees and not others.get(key)]
    if bad or len(given) < text.count(",") + 1:
        raise BridgeError(
            f"{text!r} are no sizes; write for instance tp=2,ep=2 or dp=2,tp=2,dense=shard or tp=4,attn_tp=2"
        )
    policy = policy_of_flags(given.get("policy"), numbers.get("attn_tp"))
    sizes = Sizes(**degrees, dp_outside=degrees.get("pp", 1) > 1)
    return sizes, given.get("dense", "replicate"), policy


def _staged(sizes: Sizes, hf: Mapping[str, Any]) -> Sizes:
    if sizes.pp == 1:
        return sizes
    from titan_bridge.engine.model.stages import staged  # vLLM, seconds

    return staged(sizes, hf["num_hidden_layers"])


def _trainer(file: str) -> Any:
    from titan_bridge.commands.train import job_of

    return job_of(file)


def _config_of(model: str) -> dict[str, Any]:
    from titan_bridge.checks import model_directory
    from titan_bridge.run_folder import model_and_step

    return model_directory(model_and_step(model)[0])


def _from_checkpoint(path: str, destination: Layout) -> Plan:
    from titan_bridge.checkpoint import open_checkpoint
    from titan_bridge.checkpoint.mapping import live_views
    from titan_bridge.checkpoint.model_dir import weights_directory
    from titan_bridge.models import family_for
    from titan_bridge.sharding.plan import plan

    hf = _config_of(path)
    family = family_for(hf)
    embedding = destination.params.get("tok_embeddings.weight")
    rows = hf["vocab_size"] if embedding is None else embedding.shape[0]
    with open_checkpoint(weights_directory(path) or path) as checkpoint:
        views = live_views(checkpoint.format, family, hf, rows)
        return plan(checkpoint.tensors.values(), destination, views, allow_missing=True)
