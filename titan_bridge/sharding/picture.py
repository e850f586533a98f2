"""Pictures: which rank holds which part of each tensor, and who sends how much to whom, as SVG, PNG or PDF."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.boxes import Box, pieces_of, shard_dim
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout, itemsize
from titan_bridge.sharding.plan import Plan
from titan_bridge.sharding.show import human, load_of, local_numel, pattern_of, totals_of
from titan_bridge.sharding.spec import placement_to_str

_COLUMNS = 7
_WIDTH, _LINE, _MAP = 16.0, 2.75, 1.5
"""Inches: the figure, a line of maps with their titles, and a map's height."""
_LEFT = 0.025
_STRIP = 0.3
"""Width of the map of a tensor of one dim, in widths of a map."""
_VALUES = 12
"""Senders and receivers at most whose bytes are written into the cells."""
_LABELLED = 32
"""Boxes in one map that still leave room for rank numbers."""
_MODULES = 7
_INK, _FAINT = "#1c2430", "#66707d"
_HUES = ("#6fa8dc", "#f6b26b", "#8fc98b", "#e58b88", "#b39ddb", "#d7b98e", "#f2a7d0", "#7fd1c7")
_HOW_TO_READ = (
    "A map is a global tensor (and those that look like it), dim 0 downwards; "
    "the numbers are the ranks that hold a slice, a colour is one set of ranks."
)
_HOW_TO_READ_TRAFFIC = "A cell is what a sender sends to a receiver; a white one is nothing."
_FORMATS = (".svg", ".png", ".pdf")
_BYTES = FuncFormatter(lambda value, _: human(value).replace(".00", ""))


def layout_picture(layout: Layout, path: str | Path, *, title: str = "") -> Path:
    """`layout_figure` as a file. Returns `path`. Raises BridgeError for another file type than svg, png or pdf."""
    path = _checked(path)
    layout_figure(layout, title=title).savefig(path, dpi=120)
    return path


def layout_figure(layout: Layout, *, title: str = "") -> Figure:
    """One map for each kind of parameter, and the bytes on each rank by module.

    A map is the global tensor, dim 0 downwards and the dim that is cut most beside it across; a tensor of one dim is a
    strip. Every box is what some ranks hold, and boxes of the same colour are on the same ranks.
    """
    shown, totals = _maps(layout), totals_of(layout)
    lines = {heading: math.ceil(len(maps) / _COLUMNS) for heading, maps in shown.items()}
    bars = 3.0
    # Inches, from the top: title, for each mesh a heading and its lines of maps, then the bars.
    height = 1.05 + sum(0.45 + _LINE * count for count in lines.values()) + bars + 0.35
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    _head(figure, title or "Where every parameter lives", _summary(totals), _HOW_TO_READ)
    top = height - 1.05
    for heading, maps in shown.items():
        figure.text(_LEFT, (top - 0.3) / height, heading, fontsize=11, fontweight="bold", color=_INK)
        top -= 0.45
        for line in range(lines[heading]):
            # Titles of a line stand on one level above maps of one height.
            for column, (names, param) in enumerate(maps[line * _COLUMNS : (line + 1) * _COLUMNS]):
                left = _LEFT + column * (1 - 2 * _LEFT + 0.02) / _COLUMNS
                width = (1 - 2 * _LEFT + 0.02) / _COLUMNS - 0.02
                if len(param.shape) < 2:
                    width *= _STRIP
                at = (left, (top - 0.85 - _MAP) / height, width, _MAP / height)
                _map(figure.add_axes(at), names, param, layout.meshes[param.spec.mesh])
            top -= _LINE
    at = (0.06, 0.42 / height, 0.72, (bars - 0.5) / height)
    _bars(figure.add_axes(at), layout)
    return figure


def _head(figure: Figure, title: str, summary: str, how_to_read: str) -> None:
    """Title and two lines at the top left."""
    width, height = figure.get_size_inches()
    left = _LEFT * _WIDTH / width
    size = min(15.0, 130 * width / max(len(title), 1))  # a long path is smaller, not cut
    figure.text(left, 1 - 0.38 / height, title, fontsize=size, fontweight="bold", color=_INK)
    figure.text(left, 1 - 0.66 / height, summary, fontsize=10, color=_INK)
    figure.text(left, 1 - 0.88 / height, how_to_read, fontsize=8.5, color=_FAINT)


def _summary(totals: dict[str, Any]) -> str:
    most, least = totals["most_loaded"], totals["least_loaded"]
    each = f"{human(most['bytes'])} on every rank"
    if most["bytes"] != least["bytes"]:
        each = (
            f"most {human(most['bytes'])} on rank {most['rank']}, "
            f"least {human(least['bytes'])} on rank {least['rank']}"
        )
    return (
        f"{totals['parameters']:,} parameters, {human(totals['global_bytes'])} in {totals['tensors']:,} tensors "
        f"of {', '.join(totals['dtypes'])}, "
        f"on {totals['ranks']:,} ranks: {each}"
    )


def _maps(layout: Layout) -> dict[str, list[tuple[list[str], ParamLayout]]]:
    """What to draw for each mesh: the names of parameters that look alike, and one of them."""
    headings = {name: f"{name.rstrip('0123456789')} mesh {mesh}" for name, mesh in layout.meshes.items()}
    stages = Counter(headings.values())
    alike: dict[tuple, tuple[dict[str, int], ParamLayout]] = {}
    for fqn, param in layout.params.items():
        # Pipeline stages have a mesh each: one map stands for all, drawn for the first.
        heading = headings[param.spec.mesh]
        if stages[heading] == 1:
            heading = f"{param.spec.mesh} mesh {layout.meshes[param.spec.mesh]}"
        key = (heading, param.shape, param.spec.placements)
        names, _ = alike.setdefault(key, ({}, param))
        names[pattern_of(fqn)] = names.get(pattern_of(fqn), 0) + 1
    shown: dict[str, list[tuple[list[str], ParamLayout]]] = {}
    for (heading, *_), (names, param) in alike.items():
        texts = [_short(name) + (f" ×{count}" if count > 1 else "") for name, count in names.items()]
        shown.setdefault(heading, []).append((texts, param))
    return shown


def traffic_picture(plan: Plan, path: str | Path, *, title: str = "") -> Path:
    """`traffic_figure` as a file. Returns `path`; raises as `layout_picture`."""
    path = _checked(path)
    traffic_figure(plan, title=title).savefig(path, dpi=120)
    return path


def traffic_figure(plan: Plan, *, title: str = "") -> Figure:
    """Who sends how much to whom, as a matrix with the sums at its edges; small ones have the bytes in their cells."""
    index = {owner: i for i, owner in enumerate(plan.owners)}
    sources, destinations = list(plan.sent), list(plan.received)
    matrix = plan.traffic()[np.ix_([index[h] for h in sources], [index[h] for h in destinations])]
    rows, columns = matrix.shape
    senders, receivers = _names(sources), _names(destinations)
    values = max(rows, columns) <= _VALUES
    # Inches. Left of the grid the senders' names, above and beside it the sums, below it the receivers' names.
    left = 0.95 + 0.075 * max(map(len, senders), default=0)
    slanted = max(map(len, receivers), default=0) > 8
    below = 0.75 + (0.065 * max(map(len, receivers), default=0) if slanted else 0) + (0 if values else 0.75)
    wide = min(max(0.95 * columns, 4.0), 9.0) if values else 8.0
    high = min(max(0.5 * rows, 1.0), 6.0) if values else 7.0
    width, height = max(left + wide + 2.4, 9.0), 1.05 + 1.3 + high + below
    figure = Figure(figsize=(width, height), facecolor="white")
    summary = f"{human(plan.bytes)} travel in {plan.copies_count:,} copies; "
    summary += f"the busiest sender sends {plan.balance:.3f} times the mean"
    _head(figure, title or "Who sends how much to whom", summary, _HOW_TO_READ_TRAFFIC)

    def axes_at(x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / width, y / height, w / width, h / height))

    grid = axes_at(left, below, wide, high)
    masked = np.ma.masked_equal(matrix.astype(np.float64), 0)
    low, top = (masked.min(), masked.max()) if masked.count() else (1.0, 1.0)
    norm = LogNorm(vmin=low / 2, vmax=2 * top)
    image = grid.imshow(masked, aspect="auto", norm=norm, cmap="Blues", interpolation="nearest")
    if values:
        for row, column in np.ndindex(rows, columns):
            if matrix[row, column]:
                ink = "white" if norm(matrix[row, column]) > 0.6 else _INK
                text = human(int(matrix[row, column]))
                grid.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    for axis, names in ((grid.yaxis, senders), (grid.xaxis, receivers)):
        step = max(1, math.ceil(len(names) / 16))
        axis.set_ticks(range(0, len(names), step), names[::step], fontsize=8, color=_INK)
    if slanted:
        grid.tick_params(axis="x", rotation=60)
    grid.set_ylabel("sender", fontsize=9, color=_FAINT)
    grid.set_xlabel("receiver", fontsize=9, color=_FAINT)
    _sums(axes_at(left, below + high + 0.15, wide, 0.75), grid, matrix.sum(axis=0), "received", values=values)
    _sums(axes_at(left + wide + 0.15, below, 1.6, high), grid, matrix.sum(axis=1), "sent", values=values)
    if not values and masked.count():
        where = axes_at(left, 0.45, wide, 0.12)
        ticks = np.geomspace(low, top, 2 + int(math.log10(top / low)) if top / low > 2 else 1)
        scale = figure.colorbar(image, cax=where, orientation="horizontal", ticks=ticks, format=_BYTES)
        scale.ax.minorticks_off()
        scale.ax.tick_params(labelsize=8, colors=_INK)
        scale.set_label("bytes of a pair", fontsize=8, color=_FAINT)
    return figure


def _sums(axes: Axes, grid: Axes, sums: np.ndarray, title: str, *, values: bool) -> None:
    """Bars beside (`title` "sent") or above the grid, with their bytes at their ends or on an axis."""
    beside, places, most = title == "sent", range(len(sums)), float(sums.max(initial=1)) or 1.0
    draw = axes.barh if beside else axes.bar
    bars = draw(places, sums, 0.8 if values else 1.0, color=_HUES[0])
    across, along = (axes.xaxis, axes.yaxis) if beside else (axes.yaxis, axes.xaxis)
    (axes.set_xlim if beside else axes.set_ylim)(0, most * (1.6 if values else 1.05))
    (axes.set_ylim if beside else axes.set_xlim)(*(grid.get_ylim() if beside else grid.get_xlim()))
    along.set_ticks([])
    if values:
        axes.bar_label(bars, [human(int(each)) for each in sums], padding=2, fontsize=8, color=_INK)
        across.set_ticks([])
    else:
        across.set_ticks([0, most], ["0 B", human(most)], fontsize=8, color=_INK)
    axes.set_title(title, fontsize=9, color=_FAINT, loc="left", pad=8 if beside else 3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _names(owners: Sequence[object]) -> list[str]:
    """Ranks as numbers; files by as many of their last parts as tell them apart."""
    texts = short = [str(owner) for owner in owners]
    for count in range(1, 10):
        short = ["/".join(text.split("/")[-count:]) for text in texts]
        if len(set(short)) == len(set(texts)):
            break
    return [text if len(text) <= 32 else "…" + text[-31:] for text in short]


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise BridgeError(f"picture {path}: the name must end in one of {', '.join(_FORMATS)}")
    return path


def _map(axes: Axes, names: list[str], param: ParamLayout, mesh: MeshLayout) -> None:
    """One tensor, seen along the two dims that matter most."""
    placements = param.spec.placements
    cuts = [i for i, p in enumerate(placements) if shard_dim(p) is not None and mesh.shape[i] > 1]
    holders: dict[Box, list[int]] = {}
    colours: dict[Box, tuple[float, ...]] = {}
    for coordinate in np.ndindex(*mesh.shape):
        for piece in pieces_of(placements, param.shape, mesh.shape, coordinate):
            holders.setdefault(piece.box, []).append(int(mesh.array[coordinate]))
            colours.setdefault(piece.box, _colour([(coordinate[i], mesh.shape[i]) for i in cuts]))
    dims = {i: dim for i in cuts if (dim := shard_dim(placements[i])) is not None}
    # Across: the dim beside dim 0 that is cut into most parts.
    across = max(
        range(1, len(param.shape)), key=lambda d: sum(dim == d for dim in dims.values()), default=None
    )
    y, x = (0 if param.shape else None), across
    height, width = (1 if d is None else param.shape[d] for d in (y, x))
    rectangles = []
    for box, ranks in holders.items():
        start, stop = ([0 if d is None else corner[d] for d in (x, y)] for corner in (box.start, box.stop))
        stop = [1 if d is None else value for d, value in zip((x, y), stop, strict=True)]
        rectangles.append(Rectangle((start[0], start[1]), stop[0] - start[0], stop[1] - start[1]))
        if len(holders) <= _LABELLED:
            label = "every rank" if len(ranks) == len(mesh.ranks) > 1 else _ranges(ranks)
            axes.text(
                (start[0] + stop[0]) / 2,
                (start[1] + stop[1]) / 2,
                label if len(label) < 18 else f"{len(ranks)} ranks",
                ha="center",
                va="center",
                fontsize=6 if len(holders) > 8 else 9,
                color=_INK,
                rotation=90 if len(param.shape) < 2 and len(label) > 5 else 0,
            )
    line = 1.2 if len(holders) <= 16 else 0.5 if len(holders) <= 64 else 0
    axes.add_collection(
        PatchCollection(
            rectangles,
            facecolors=list(colours.values()),
            edgecolors="white" if line else "face",
            linewidths=line,
        )
    )
    axes.set_xlim(0, max(width, 1e-9))
    axes.set_ylim(max(height, 1e-9), 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(_FAINT)
    axes.set_ylabel("" if y is None else f"dim {y}: {height:,}", fontsize=7.5, color=_FAINT)
    slices = len({tuple(ranks) for ranks in holders.values()})
    numel = int(local_numel(param, mesh).max())
    whole = (
        "whole on every rank"
        if slices == 1
        else f"{slices:,} slices, {human(numel * itemsize(param.dtype))} each"
    )
    below = f"\n{whole}" if x is None else f"dim {x}: {width:,}\n{whole}"
    axes.set_xlabel(below, fontsize=7.5, color=_FAINT, loc="left")
    how = ", ".join(f"{mesh.axes[i]} {placement_to_str(placements[i])}" for i in cuts) or "replicated"
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    shape = " × ".join(f"{size:,}" for size in param.shape) or "scalar"
    above = axes.annotate
    place = {
        "xy": (0, 1),
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "annotation_clip": False,
    }
    above("\n".join(names[:2]) + more, xytext=(0, 27), fontsize=8.5, fontweight="bold", color=_INK, **place)
    above(shape, xytext=(0, 16), fontsize=8, color=_INK, **place)
    above(how, xytext=(0, 5), fontsize=8, color="#0b5cad", **place)


def _colour(cuts: list[tuple[int, int]]) -> tuple[float, ...]:
    """Hue by the place on the outer axes that cut the tensor, lightness by that on the innermost of several."""
    if not cuts:
        return to_rgb("#e3e6ea")
    outer, inner = (cuts[:-1], cuts[-1]) if len(cuts) > 1 else (cuts, None)
    place, count = 0, 1
    for at, size in outer:
        place, count = place * size + at, count * size
    if count <= len(_HUES):
        hue = np.asarray(to_rgb(_HUES[place]))
    else:
        hue = np.asarray(colormaps["turbo"](0.08 + 0.84 * place / (count - 1))[:3]) * 0.75 + 0.25
    white = 0.0 if inner is None else 0.6 * inner[0] / max(inner[1] - 1, 1)
    return tuple(hue * (1 - white) + white)


def _short(name: str) -> str:
    """The last two parts of a name, with which people tell modules apart: "inner_experts.w1_EFD"."""
    parts = [part for part in name.removesuffix(".weight").split(".") if part not in ("layers", "*")]
    short = ".".join(parts[-2:]) or name
    return short if len(short) <= 27 else "…" + short[-26:]


def _ranges(ranks: list[int]) -> str:
    """ "0-3, 8" for ranks 0, 1, 2, 3 and 8."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def _bars(axes: Axes, layout: Layout) -> None:
    """Bytes on each rank, stacked by module."""
    load = load_of(layout)
    modules = _by_module(layout)
    largest = sorted(modules, key=lambda module: -int(modules[module].sum()))
    bottom = np.zeros(len(load), dtype=np.int64)
    edges = np.arange(len(load) + 1) - 0.5
    for i, module in enumerate([*largest[:_MODULES], "others"]):
        members = largest[_MODULES:] if module == "others" else [module]
        size = sum((modules[member] for member in members), np.zeros_like(bottom))
        if not size.any():
            continue
        colour, share = colormaps["tab20"](i), size.sum() / max(sum(load.values()), 1)
        label = f"{module}  {human(int(size.max()))}" + (f"  {share:.0%}" if share >= 0.005 else "")
        # One outline for each module: bars of their own take seconds at a thousand ranks.
        axes.stairs(bottom + size, edges, baseline=bottom, fill=True, label=label, color=colour)
        bottom = bottom + size
    limit = float(bottom.max(initial=1)) or 1.0
    axes.set_title("bytes on each rank, by module", fontsize=11, fontweight="bold", loc="left", color=_INK)
    if len(load) <= 64:
        axes.vlines(edges, 0, limit, color="white", linewidth=2)
    axes.set_ylim(0, limit * 1.05)
    axes.set_xlim(-0.5, len(load) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(32, len(load)), integer=True))
    names = dict(enumerate(map(str, load)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: names.get(int(value), "")))
    axes.yaxis.set_major_formatter(_BYTES)
    axes.set_xlabel("rank", fontsize=8)
    axes.tick_params(labelsize=8, colors=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _by_module(layout: Layout) -> dict[str, np.ndarray]:
    """int64 bytes on each rank by the module that holds them, two names deep: "attention.wo"."""
    modules: dict[str, dict[str, ParamLayout]] = {}
    for fqn, param in layout.params.items():
        parts = [part for part in pattern_of(fqn).split(".") if part not in ("layers", "*", "weight", "bias")]
        modules.setdefault(".".join(parts[:2]) or fqn, {})[fqn] = param
    loads = {module: load_of(replace(layout, params=own)) for module, own in modules.items()}
    return {module: np.array(list(load.values()), dtype=np.int64) for module, load in loads.items()}
