"""Layouts and plans as tables for people and as plain data for machines. The pictures are in `picture.py`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.boxes import axes_of, segments_of
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout, itemsize
from titan_bridge.sharding.plan import Plan
from titan_bridge.sharding.spec import placement_to_str

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def human(nbytes: float) -> str:
    """Bytes with a decimal unit: "1.50 GB"."""
    if abs(nbytes) < 1000:
        return f"{nbytes:.0f} B"
    power = next((n for n in (1, 2, 3) if abs(nbytes) < 1000 ** (n + 1)), 4)
    return f"{nbytes / 1000**power:.2f} {' kMGT'[power]}B"


def pattern_of(fqn: str) -> str:
    """The name without layer and expert numbers: "layers.*.attention.wo.weight"."""
    return _NUMBER.sub("*", fqn)


def ranges(numbers: Iterable[int]) -> str:
    """ "0-2, 5" for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def local_numel(param: ParamLayout, mesh: MeshLayout) -> np.ndarray:
    """int64 of the shape of the mesh: elements of the local tensor at each position."""
    total = np.ones(mesh.shape, dtype=np.int64)
    for d, size in enumerate(param.shape):
        axes = axes_of(param.spec.placements, d)
        shape = [n if axis in axes else 1 for axis, n in enumerate(mesh.shape)]
        held = []
        for at in np.ndindex(*shape):
            cuts = [(param.spec.placements[axis], mesh.shape[axis], at[axis]) for axis in axes]
            held.append(sum(b - a for a, b, _ in segments_of(size, cuts)))
        total *= np.asarray(held, dtype=np.int64).reshape(shape)
    return total


def load_of(layout: Layout) -> dict[int, int]:
    """Bytes of parameters on each rank, exactly, uneven shards included; ranks in order."""
    ranks = np.asarray(layout.ranks, dtype=np.int64)
    nbytes = np.zeros(len(ranks), dtype=np.int64)
    for param, count in Counter(layout.params.values()).items():  # a large model has a dozen kinds
        mesh = layout.meshes[param.spec.mesh]
        at = np.searchsorted(ranks, mesh.array)
        nbytes[at] += local_numel(param, mesh) * itemsize(param.dtype) * count
    return dict(zip(ranks.tolist(), nbytes.tolist(), strict=True))


def layout_rows(layout: Layout, rank: int | None = None, *, collapse: bool = False) -> list[dict[str, Any]]:
    """One row for each parameter, as plain data.

    Args:
        rank: Whose local shapes to give; by default those of the first rank of each mesh.
        collapse: One row for all layers that look alike; `count` says how many parameters it stands for.

    Returns dicts with name, count, shape (global), dtype, mesh, placements, local_shape (None when the rank is not on
    the mesh), rank_bytes (of this rank) and max_rank_bytes; bytes are those of one parameter. Raises BridgeError when
    the layout does not have the rank.
    """
    ranks = layout.ranks
    if rank is not None and rank not in ranks:
        raise BridgeError(f"rank {rank} is not in the layout; it has ranks {ranks[0]} to {ranks[-1]}")
    rows: dict[tuple, dict[str, Any]] = {}
    largest: dict[ParamLayout, int] = {}
    for fqn, param in layout.params.items():
        mesh = layout.meshes[param.spec.mesh]
        name = pattern_of(fqn) if collapse else fqn
        if (row := rows.get((name, param))) is not None:
            row["count"] += 1
            continue
        if param not in largest:
            largest[param] = int(local_numel(param, mesh).max()) * itemsize(param.dtype)
        local = layout.local_shape(fqn, mesh.ranks[0] if rank is None else rank)
        rows[name, param] = {
            "name": name,
            "count": 1,
            "shape": list(param.shape),
            "dtype": param.dtype,
            "mesh": param.spec.mesh,
            "placements": [placement_to_str(placement) for placement in param.spec.placements],
            "local_shape": None if local is None else list(local),
            "rank_bytes": 0 if local is None else math.prod(local) * itemsize(param.dtype),
            "max_rank_bytes": largest[param],
        }
    return list(rows.values())


def totals_of(layout: Layout) -> dict[str, Any]:
    """Parameters, dtypes, global bytes, bytes over all ranks, and the most and least loaded rank, as plain data."""
    load = load_of(layout)
    elements = {param: math.prod(param.shape) * n for param, n in Counter(layout.params.values()).items()}
    most, least = max(load, key=load.__getitem__), min(load, key=load.__getitem__)
    return {
        "tensors": len(layout.params),
        "dtypes": sorted({param.dtype for param in elements}),
        "parameters": sum(elements.values()),
        "global_bytes": sum(n * itemsize(param.dtype) for param, n in elements.items()),
        "all_ranks_bytes": sum(load.values()),
        "ranks": len(load),
        "most_loaded": {"rank": most, "bytes": load[most]},
        "least_loaded": {"rank": least, "bytes": load[least]},
    }


def in_words(totals: dict[str, Any]) -> str:
    """What `totals_of` says of bytes, as one line."""
    most, least = totals["most_loaded"], totals["least_loaded"]
    return (
        f"{human(totals['global_bytes'])} in {totals['tensors']:,} tensors of {', '.join(totals['dtypes'])}; "
        f"{human(totals['all_ranks_bytes'])} over all ranks; most: rank {most['rank']} with {human(most['bytes'])}; "
        f"least: rank {least['rank']} with {human(least['bytes'])}"
    )


def layout_table(layout: Layout, rank: int | None = None, *, collapse: bool = True) -> Table:
    """`layout_rows` and `totals_of` as a table to print."""
    totals = totals_of(layout)
    meshes = ", ".join(f"{name} {mesh}" for name, mesh in list(layout.meshes.items())[:6])
    more = f" and {len(layout.meshes) - 6} more" if len(layout.meshes) > 6 else ""
    title = f"{totals['parameters']:,} parameters on {totals['ranks']} ranks: {meshes}{more}"
    of = "first rank" if rank is None else f"rank {rank}"
    texts = ("parameter", "global shape", "mesh", "placements", f"local shape, {of}")
    table = _table(title, texts, ("bytes a rank",), caption=in_words(totals))
    for row in layout_rows(layout, rank, collapse=collapse):
        name = Text(row["name"])
        if row["count"] > 1:
            name.append(f"  x{row['count']}", style="dim")
        nbytes = row["max_rank_bytes"] if rank is None else row["rank_bytes"]
        table.add_row(
            name,
            _sizes(row["shape"]),
            row["mesh"],
            Text(", ".join(row["placements"])),
            "not there" if row["local_shape"] is None else _sizes(row["local_shape"]),
            human(nbytes * row["count"]),
        )
    return table


def plan_summary(plan: Plan, *, pairs: int = 10) -> dict[str, Any]:
    """Bytes by tensor group, the rank pairs with most traffic, lower bound and balance, as plain data."""
    groups: Counter[str] = Counter()
    for name, nbytes in plan.by_tensor().items():
        groups[pattern_of(name)] += nbytes
    owners = [owner if isinstance(owner, int) else str(owner) for owner in plan.owners]
    traffic = plan.traffic()
    largest = np.argsort(-traffic, axis=None, kind="stable")[:pairs]
    return {
        "bytes": plan.bytes,
        "lower_bound": plan.lower_bound,
        "copies": plan.copies_count,
        "balance": plan.balance,
        "balance_floor": plan.balance_floor,
        "by_group": dict(groups),
        "sent": {str(owner): nbytes for owner, nbytes in plan.sent.items()},
        "received": {str(owner): nbytes for owner, nbytes in plan.received.items()},
        "pairs": int((traffic > 0).sum()),
        "largest_pairs": [
            {"source": owners[a], "destination": owners[b], "bytes": int(traffic[a, b])}
            for a, b in zip(*np.unravel_index(largest, traffic.shape), strict=True)
            if traffic[a, b]
        ],
        "unused": list(plan.unused),
        "missing": dict(plan.missing),
    }


def plan_tables(plan: Plan, *, pairs: int = 10) -> Sequence[Table]:
    """`plan_summary` as two tables to print: by tensor group, and the largest rank pairs."""
    summary = plan_summary(plan, pairs=pairs)
    title = f"{human(plan.bytes)} travel (the lower bound) in {plan.copies_count:,} copies"
    caption = (
        f"most loaded sender over mean: {plan.balance:.3f} (no choice gets below {plan.balance_floor:.3f}); "
        f"{len(plan.sent)} senders, {len(plan.received)} receivers, {summary['pairs']:,} pairs"
    )
    groups = _table(title, ("tensors",), ("bytes", "share"), caption=caption)
    for name, nbytes in sorted(summary["by_group"].items(), key=lambda item: -item[1]):
        groups.add_row(Text(name), human(nbytes), f"{nbytes / max(plan.bytes, 1):.1%}")
    largest = _table(f"largest of {summary['pairs']:,} pairs", ("from", "to"), ("bytes",))
    for pair in summary["largest_pairs"]:
        largest.add_row(str(pair["source"]), str(pair["destination"]), human(pair["bytes"]))
    return groups, largest


def _table(title: str, texts: Iterable[str], numbers: Iterable[str], caption: str | None = None) -> Table:
    columns = [Column(text, overflow="fold") for text in texts]
    columns += [Column(number, justify="right") for number in numbers]
    return Table(*columns, title=title, caption=caption, title_justify="left", caption_justify="left")


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
