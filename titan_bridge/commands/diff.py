"""`titan-bridge diff`: what differs between two checkpoints, or between two layouts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from titan_bridge.cli import imports
from titan_bridge.commands.infer import Text
from titan_bridge.commands.progress import Bars
from titan_bridge.errors import BridgeError

if TYPE_CHECKING:
    from titan_bridge.checkpoint.compare import Side
    from titan_bridge.sharding.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    """Compare two checkpoints of any formats tensor by tensor, or two layout files.

    Lists tensors that only one side has, other shapes and dtypes, and for equal shapes the largest and the mean
    difference of the values. Formats may differ: then tensors are compared under Hugging Face's names. Exits with 1 if
    anything differs. Layouts are files of `titan-bridge inspect MODEL ... --json`; their placements are compared, too.

    Example: titan-bridge diff out/demo/qwen3_moe out/demo/qwen3_moe_ep2
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Checkpoint: a model folder in any format, a training run, or one step of it; or a layout file (.json)."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The same."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16,float16}", help_behavior_hint=""),
    ] = None
    """Cast both sides to it first; then other dtypes are no difference."""
    atol: float = 0.0
    """Largest difference of two values that counts as equal."""
    config: Text = None
    """Where neither side has a config.json and the formats differ: a directory with one."""
    names: Annotated[Text, tyro.conf.arg(metavar="PATTERN")] = None
    """Where another program wrote A: how it calls the tensor NAME, with {} in place of NAME, for example
    'state.model.{}'; tensors that do not fit are left out."""
    names_b: Annotated[Text, tyro.conf.arg(metavar="PATTERN")] = None
    """The same of B."""
    show: int = 20
    """How many tensors of each kind to list, the largest difference first; --json has all of them."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        if not self.atol >= 0:
            raise BridgeError(f"--atol {self.atol}; give a number of at least 0")
        if self.show < 0:
            raise BridgeError(f"--show {self.show}; give at least 0")
        layouts = [side.endswith(".json") and not Path(side).is_dir() for side in (self.a, self.b)]
        if any(layouts) and not all(layouts):
            raise BridgeError(f"{self.a} and {self.b}: give two checkpoints or two layout files")
        facts = self._layouts() if all(layouts) else self._checkpoints()
        equal = not any(
            facts[what] for what in ("only_a", "only_b", "shape", "dtype", "placements", "values")
        )
        facts = {"a": self.a, "b": self.b, "equal": equal} | facts
        print(json.dumps(facts) if self.json else self._text(facts))
        return 0 if equal else 1

    def _layouts(self) -> dict[str, Any]:
        from titan_bridge.sharding.layout import Layout

        a, b = (Layout.read(Path(side)) for side in (self.a, self.b))
        params = {fqn: (a.params[fqn], b.params[fqn]) for fqn in a.params if fqn in b.params}
        facts = _names(a.params, b.params)
        facts["shape"] = [
            {"name": fqn, "a": list(one.shape), "b": list(other.shape)}
            for fqn, (one, other) in params.items()
            if one.shape != other.shape
        ]
        facts["dtype"] = [
            {"name": fqn, "a": one.dtype, "b": other.dtype}
            for fqn, (one, other) in params.items()
            if one.dtype != other.dtype and self.dtype is None
        ]
        where = {fqn: (_where(a, fqn), _where(b, fqn)) for fqn in params}
        facts["placements"] = [
            {"name": fqn, "a": one, "b": other} for fqn, (one, other) in where.items() if one != other
        ]
        return facts | {"values": [], "left_out": [], "compared": len(params)}

    def _checkpoints(self) -> dict[str, Any]:
        with imports():
            import torch  # with what follows, two seconds that a bad flag need not wait for

            from titan_bridge.checkpoint import compare
            from titan_bridge.sharding.layout import dtype_name

        dtype = getattr(torch, self.dtype) if self.dtype else None
        a, b = compare.open_sides([self.a, self.b], config=self.config, names=[self.names, self.names_b])
        with a.source, b.source:
            common = [(one, b.tensors[name]) for name, one in a.tensors.items() if name in b.tensors]
            facts = _names(a.tensors, b.tensors)
            facts["shape"] = [
                {"name": one.name, "a": list(one.shape), "b": list(other.shape)}
                for one, other in common
                if one.shape != other.shape
            ]
            facts["dtype"] = [
                {"name": one.name, "a": dtype_name(one.dtype), "b": dtype_name(other.dtype)}
                for one, other in common
                if one.dtype != other.dtype and dtype is None
            ]
            total = sum(one.nbytes for one, other in common if one.shape == other.shape)
            with Bars({"compare": total}) as bars:
                found = list(
                    compare.differences(a, b, dtype=dtype, advance=lambda n: bars.advance("compare", n))
                )
            facts["values"] = [
                dataclasses.asdict(each)
                for each in sorted(found, key=lambda each: (-each.not_finite, -each.max, each.name))
                if each.not_finite or each.max > self.atol
            ]
            return facts | {"placements": [], "left_out": _left_out(a, b), "compared": len(found)}

    def _text(self, facts: dict[str, Any]) -> str:
        lines = []
        for what, side in (("only_a", self.a), ("only_b", self.b)):
            lines += self._some(facts[what], f"only in {side}: ", str)
        for what in ("shape", "dtype", "placements"):
            lines += self._some(
                facts[what], "", lambda each, what=what: f"{each['name']}: {what} {each['a']} and {each['b']}"
            )
        lines += self._some(facts["values"], "", _value_line)
        if facts["left_out"]:
            lines.append(f"not compared: {', '.join(facts['left_out'][: self.show])}")
        count = facts["compared"]
        if facts["equal"]:
            within = f" within {self.atol:g}" if self.atol else ""
            lines.append(f"equal{within}: {count:,} tensors")
        else:
            lines.append(
                f"different: {len(facts['values']):,} of {count:,} tensors on both sides have other values"
            )
        return "\n".join(lines)

    def _some(self, items: list[Any], prefix: str, line: Any) -> list[str]:
        more = len(items) - self.show
        shown = [prefix + line(each) for each in items[: self.show]]
        return [*shown, f"{prefix}... and {more:,} more"] if more > 0 else shown


def _names(a: Any, b: Any) -> dict[str, Any]:
    return {"only_a": [name for name in a if name not in b], "only_b": [name for name in b if name not in a]}


def _where(layout: Layout, fqn: str) -> str:
    """Mesh and placements of a parameter in words."""
    spec, mesh = layout.params[fqn].spec, layout.mesh_of(fqn)
    return f"{spec} of {'x'.join(map(str, mesh.shape))}"


def _left_out(a: Side, b: Side) -> list[str]:
    return sorted({*a.left_out, *b.left_out})


def _value_line(each: dict[str, Any]) -> str:
    odd = f", {each['not_finite']:,} NaN or infinite on one side" if each["not_finite"] else ""
    return (
        f"{each['name']}: max {each['max']:.3g}, mean {each['mean']:.3g}, "
        f"{each['different']:,} of {each['elements']:,} elements{odd}"
    )
