"""`titan-bridge inspect`: where every parameter of a model would live, from its config.json alone."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from titan_bridge.commands.infer import InferCommand, Int, Text
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import DEGREES

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder

    from titan_bridge.mesh import Sizes
    from titan_bridge.policy.layers import Split
    from titan_bridge.policy.schema import Policy
    from titan_bridge.sharding.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(InferCommand):
    """Show where every parameter of a model lives on dp * pp * tp ranks: mesh, placements, local shapes, bytes a rank.

    Needs config.json only: no weights, no GPU and no second process, at any size. The same layout comes from a
    running engine: `titan_bridge.engine.specs.layout(llm)`, or GET /v1/sharding_spec of `serve --sharding-spec`. For a
    TOML file of `titan-bridge train` it is the trainer's layout. With a policy it shows layers: the rule that
    decides on each, weights, and bytes of KV cache a token and rank; so it does with --attention-dp, and names groups.

    Example: titan-bridge inspect out/demo/qwen3_moe --dp 2 --tp 2 --ep 4 --picture layout.svg
    """

    needs_weights = False
    rank: Int = None
    """Show the local shapes and bytes of this rank."""
    all: bool = False
    """One row for every parameter, not one for all layers that look alike."""
    layers: bool = False
    """Show layers instead of parameters, as with a policy."""
    why: Text = None
    """Explain how this layer, module or parameter (by FQN) is split."""
    picture: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    """Draw it: FILE ends in .svg, .png or .pdf; may be repeated."""
    json: bool = False
    """Print the layout as JSON (with --rank: that rank's rows and the totals)."""

    def run(self) -> int:
        shown = self._trainer() if _is_train_file(self.model) else self._engine()
        found, title = shown.layout, shown.title

        from titan_bridge.sharding import show  # numpy and torch, as what follows

        world = len(found.ranks)
        if self.rank is not None and not 0 <= self.rank < world:
            raise BridgeError(f"rank {self.rank} is outside the world of {world}; allowed: 0 to {world - 1}")
        for file in self.picture:
            from titan_bridge.sharding.picture import picture  # matplotlib

            picture(found, file, title=title)
        by_layer = self.layers or (shown.policy and not self.json and self.rank is None and not self.all)
        if self.why is not None and (self.json or self.rank is not None):
            raise BridgeError(
                f"--why prints text on all ranks; leave {'--json' if self.json else '--rank'} out"
            )
        if self.layers and self.rank is not None:
            raise BridgeError("--layers shows all ranks; leave --rank out")
        if self.why is not None or by_layer:
            self._show_layers(shown)
        elif self.json and self.rank is None:
            print(json.dumps(found.to_json()))
        elif self.json:
            rows = show.layout_rows(found, self.rank)
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
        for note in shown.notes:
            print(f"titan-bridge: {note}", file=sys.stderr)
        return 0

    def _show_layers(self, shown: _Shown) -> None:
        from rich.console import Console

        from titan_bridge.policy import show

        if shown.split is None or shown.config is None:
            raise BridgeError(f"--layers and --why are for an engine; {self.model} is a file for training")
        if self.why is not None:
            for line in show.why(shown.policy, shown.split, shown.layout, self.why):
                print(line)
        elif self.json:
            print(json.dumps(show.layer_rows(shown.split, shown.config, shown.layout)))
        else:
            table = show.layer_table(shown.policy, shown.split, shown.config, shown.layout)
            Console(width=None if sys.stdout.isatty() else 200).print(table)
            for file in self.picture:
                print(f"picture {file}")

    def _engine(self) -> _Shown:
        config = self.resolve().config

        import torch  # with what follows, four seconds that a bad flag need not wait for

        from titan_bridge.checks import model_directory, overridden
        from titan_bridge.engine.options import titan_options

        hf = overridden(model_directory(config.model), config.vllm.get("hf_overrides"))

        from titan_bridge.model_layout import layout, stated_dtype
        from titan_bridge.models import family_for
        from titan_bridge.policy.layers import split
        from titan_bridge.policy.show import layer_rows, what_groups_win

        parallel = config.parallel
        sizes = parallel.sizes
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        notes = []
        stated = stated_dtype(hf)
        if config.dtype == "auto" and stated is None:
            notes.append(
                "shown in float32, since config.json states no dtype; vLLM takes that of the weights"
            )
        elif config.dtype == "auto" and stated == torch.float32:
            notes.append(
                "shown in float32, as config.json says; vLLM serves such a checkpoint in bfloat16 unless told "
                "--dtype float32"
            )
        family = family_for(hf)
        tree = family.model_config(hf)
        if sizes.pp > 1:
            from titan_bridge.engine.model.stages import staged  # vLLM, seconds

            sizes = staged(sizes, len(tree.layers))
        decided = split(
            config.policy,
            family,
            tree,
            sizes,
            attention_dp=titan_options(config.additional_config()).attention_dp,
        )
        found = layout(hf, sizes, parallel.dense, dtype=dtype, policy=decided.policy)
        if decided.groups > 1:
            plain = split(config.policy, family, tree, sizes)
            notes.append(what_groups_win(decided, plain, layer_rows(decided, tree, found)))
        return _Shown(
            layout=found,
            title=_title(config.model, hf, decided.sizes, parallel.dense),
            notes=(*notes, *decided.remarks),
            policy=decided.policy,
            split=decided,
            config=tree,
        )

    def _trainer(self) -> _Shown:
        from titan_bridge.commands.train import job_of
        from titan_bridge.policy.schema import NO_POLICY

        own = ("enable_expert_parallel", "model_impl", "names")
        for flag in ("pp", "dense", "dtype", "max_model_len", "attention_tp", "attention_dp", "policy", *own):
            if getattr(self, flag) not in (None, False):
                name = flag.replace("_", "-")
                raise BridgeError(
                    f"--{name} is for an engine; {self.model} is a file for `titan-bridge train`"
                )
        flags = {f"parallel.{axis}": getattr(self, axis) for axis in DEGREES if axis != "pp"}
        job = job_of(self.model, self.set, flags)
        title = _title(self.model, job.hf_config, job.sizes, "shard")
        return _Shown(layout=job.layout(), title=title, policy=NO_POLICY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shown:
    """A layout and where it comes from; `split` and `config` are those of an engine."""

    layout: Layout
    title: str
    policy: Policy
    notes: tuple[str, ...] = ()
    split: Split | None = None
    config: Decoder.Config | None = None


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
    widths = sorted({width for _, width in sizes.widths})
    narrow = f", layers at tp={', '.join(map(str, widths))}" if widths else ""
    return f"{folder.name} ({architecture}): {numbers}{narrow}, dense weights {dense}"
