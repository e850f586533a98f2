"""A policy's decisions as plain data and as a table: what each layer's ranks hold of it, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text
from torchtitan.models.common.decoder import Decoder

from titan_bridge.errors import BridgeError
from titan_bridge.models.adapters import inner_attention, latent_attention
from titan_bridge.policy.layers import Split
from titan_bridge.policy.schema import Policy
from titan_bridge.sharding.layout import Layout, itemsize
from titan_bridge.sharding.show import human, local_numel, pattern_of, ranges


def layer_rows(split: Split, config: Decoder.Config, layout: Layout) -> list[dict[str, Any]]:
    """One row for each layer, then one for what no policy splits, in the model's order.

    Returns:
        Dicts with name, kind, rule (index or None), tp_size, ep_size, dcp_size, placements (of its parameters, each
        once), weight_bytes (of the most loaded rank), kv_bytes and latent_bytes. The latter two are bytes that a rank
        caches for a token, as the keys and values of its heads and as a latent; None where there is none.
    """
    held: dict[str, int] = {}
    placed: dict[str, dict[str, None]] = {}
    largest: dict[Any, int] = {}
    for fqn, param in layout.params.items():
        owner = _owner(split, fqn)
        if param not in largest:
            largest[param] = int(local_numel(param, layout.mesh_of(fqn)).max()) * itemsize(param.dtype)
        held[owner] = held.get(owner, 0) + largest[param]
        placed.setdefault(owner, {})[str(param.spec)] = None
    item = itemsize(layout.param("norm.weight").dtype)
    rows = []
    for fqn, layer in split.layers.items():
        plan = split.plans[fqn]
        cache: dict[str, int | None] = {"kv_bytes": None, "latent_bytes": None}
        if layer.kind == "attention":
            attention = config.layers[int(fqn.split(".")[1])].attention
            inner, latent = inner_attention(attention), latent_attention(attention)
            cache["kv_bytes"] = 2 * inner.n_kv_heads // plan.tp_size * inner.qk_head_dim * item
            cache["latent_bytes"] = None if latent is None else latent.width * item
        sizes = {name: size for name, size in vars(plan).items() if name != "rule"}
        rows.append(
            {
                "name": fqn, "kind": layer.kind, "rule": plan.rule, **sizes, "placements": list(placed.get(fqn, ())),
                "weight_bytes": held.get(fqn, 0), **cache,
            }
        )  # fmt: skip
    return rows


def most_loaded(split: Split, layout: Layout, rows: list[dict[str, Any]], *, tied: bool) -> dict[str, int]:
    """What a rank of the pipeline stage with most weights holds: stage, weights, norms (which no policy splits), and
    the caches of `layer_rows`."""
    totals = [
        {"weights": 0, "norms": 0, "kv_bytes": 0, "latent_bytes": 0, "stage": stage}
        for stage in range(split.sizes.pp)
    ]
    for fqn, param in layout.params.items():
        if not _owner(split, fqn):
            for stage in split.sizes.stages_of(fqn) or (0,):
                totals[stage]["norms"] += param.nbytes
                totals[stage]["weights"] += param.nbytes
    for row in rows:
        for stage in split.sizes.stages_of(row["name"], tied=tied) or (0,):
            totals[stage]["weights"] += row["weight_bytes"]
            for cache in ("kv_bytes", "latent_bytes"):
                totals[stage][cache] += row[cache] or 0
    return max(totals, key=lambda total: total["weights"])


def what_groups_win(split: Split, plain: Split, rows: list[dict[str, Any]]) -> str:
    """One line about attention groups: `rows` are those of `split`, and `plain` is the same model without groups."""
    attention = [row for row in rows if row["kind"] == "attention"]
    held = sum(row["kv_bytes"] for row in attention)
    without = sum(row["kv_bytes"] * row["tp_size"] // plain.plans[row["name"]].tp_size for row in attention)
    latent = sum(row["latent_bytes"] or 0 for row in attention)
    return (
        f"attention_dp: {split.groups} groups of {split.sizes.tp // split.groups} ranks with requests of their own; a "
        f"token takes {held:,} bytes on each rank of its group, without groups {without:,} on each of tp="
        f"{split.sizes.tp}: the same memory holds {split.groups * without / held:.3g} times the tokens"
        + (f", as latents ({latent:,} bytes) {split.groups}" if latent else "")
    )


def layer_table(policy: Policy, split: Split, config: Decoder.Config, layout: Layout) -> Table:
    """`layer_rows` as a table to print, layers that look alike in one row."""
    rows = layer_rows(split, config, layout)
    most = most_loaded(split, layout, rows, tied=config.enable_weight_tying)
    rank = "a rank" if split.sizes.pp == 1 else f"a rank of stage {most['stage']}, which has most,"
    table = Table(
        title=f"{len(rows)} layers on " + ", ".join(f"{k}={n}" for k, n in split.sizes.degrees.items()),
        caption=(
            f"{rank} holds {human(most['weights'])} of weights ({human(most['norms'])} of them norms) and caches "
            f"{most['kv_bytes']:,} bytes a token"
            + (f"; as latents {most['latent_bytes']:,}" if most["latent_bytes"] else "")
        ),
        title_justify="left",
        caption_justify="left",
    )
    for column in ("layer", "kind", "rule", "plan", "placements"):
        table.add_column(column, overflow="fold")
    for column in ("weights a rank", "KV bytes a token and rank"):
        table.add_column(column, justify="right")
    alike: dict[str, list[str]] = {}
    for row in rows:
        same = {key: value for key, value in row.items() if key != "name"}
        alike.setdefault(json.dumps([pattern_of(row["name"]), same]), []).append(row["name"])
    for key, names in alike.items():
        pattern, row = json.loads(key)
        name = Text(names[0] if len(names) == 1 else pattern)
        if len(names) > 1:
            numbers = [int(name.split(".")[1]) for name in names]
            name.append(f"  {ranges(numbers)}", style="dim")
        at = row["rule"]
        cache = "" if row["kv_bytes"] is None else f"{row['kv_bytes']:,}"
        if row["latent_bytes"]:
            cache += f", latent {row['latent_bytes']:,}"
        table.add_row(
            name,
            row["kind"],
            "none" if at is None else f"{at}: {policy.rules[at].match}",
            _plan(row),
            "\n".join(row["placements"]),
            f"{human(row['weight_bytes'])}{f' x {len(names)}' if len(names) > 1 else ''}",
            cache,
        )
    return table


def why(policy: Policy, split: Split, layout: Layout, fqn: str) -> Iterator[str]:
    """Why a layer, or the module or parameter `fqn` of it, is split as it is, in lines.

    Raises:
        BridgeError: The model has nothing of that name.
    """
    held = {name: param for name, param in layout.params.items() if f"{name}.".startswith(f"{fqn}.")}
    if not held and fqn not in split.layers:
        raise BridgeError(f"--why {fqn}: the model has no such layer, module or parameter; give one of --all")
    owner = _owner(split, fqn)
    if not owner:
        yield f"{fqn} is in no layer that a policy splits"
    else:
        layer, plan = split.layers[owner], split.plans[owner]
        cut = ", ".join(f"{name}={size}" for name, size in layer.divides.items())
        yield f"{fqn} belongs to {owner}: {layer.kind} {layer.flavor or ''}".rstrip() + (
            f", {cut}" if cut else ""
        )
        for at, rule in enumerate(policy.rules[: len(policy.rules) if plan.rule is None else plan.rule + 1]):
            said = ", ".join(f"{name}={size}" for name, size in rule.plan.given.items())
            yield f"rules.{at} ({rule.match}): " + (
                f"decides, {said}" if at == plan.rule else "is not for it"
            )
        if plan.rule is None:
            inside = f"; it goes with {layer.inside[0]}" if layer.inside else ""
            yield f"no rule is for it{inside}" if policy else f"there are no rules{inside}"
        yield f"plan: {_plan(vars(plan))} of tp={split.sizes.tp}"
    for name, param in held.items():
        yield f"{name}: {param}, {list(layout.local_shape(name, layout.mesh_of(name).ranks[0]) or ())} on a rank"


def _owner(split: Split, fqn: str) -> str:
    """The layer that a parameter belongs to, or ""."""
    while fqn and fqn not in split.layers:
        fqn = fqn.rpartition(".")[0]
    return fqn


def _plan(plan: dict[str, Any]) -> str:
    shown = {"tp": plan["tp_size"], "ep": plan["ep_size"], "dcp": plan["dcp_size"]}
    return " ".join(f"{name}={size}" for name, size in shown.items() if size > 1 or name == "tp")
