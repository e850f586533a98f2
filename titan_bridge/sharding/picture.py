"""Pictures: which rank holds which part of each tensor, and who sends how much to whom, as SVG, PNG or PDF."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.boxes import Box, pieces_of, shard_dim
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout, itemsize
from titan_bridge.sharding.plan import Plan
from titan_bridge.sharding.show import human, in_words, load_of, local_numel, pattern_of, ranges, totals_of
from titan_bridge.sharding.spec import placement_to_str

_COLUMNS = 7
_WIDTH, _LINE, _MAP = 16.0, 2.75, 1.5
"""Inches: the figure, a line of maps with their titles, and a map's height."""
_LEFT = 0.025
_STRIP = 0.3  # width of the map of a tensor of one dim, in widths of a map
_VALUES = 12  # senders and receivers at most whose bytes are written into the cells
_LABELLED = 32  # boxes in one map that still leave room for rank numbers
_MODULES = 7
_INK, _FAINT, _CUT = "#1c2430", "#66707d", "#0b5cad"
_HUES = ("#6fa8dc", "#f6b26b", "#8fc98b", "#e58b88", "#b39ddb", "#d7b98e", "#f2a7d0", "#7fd1c7")
_HOW_TO_READ = (
    "A map is a global tensor (and those that look like it), dim 0 downwards; "
    "the numbers are the ranks that hold a slice, a colour is one set of ranks."
)
_HOW_TO_READ_TRAFFIC = "A cell is what a sender sends to a receiver; a white one is nothing."
_FORMATS = (".svg", ".png", ".pdf")
_BYTES = FuncFormatter(lambda value, _: human(value).replace(".00", ""))


def picture(shown: Layout | Plan, path: str | Path, *, title: str = "") -> Path:
    """Where the parameters of a layout live, or who sends how much to whom in a plan, as a file. Returns its path.
    Raises BridgeError for another file type than svg, png or pdf."""
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise BridgeError(f"picture {path}: the name must end in one of {', '.join(_FORMATS)}")
    is_layout = isinstance(shown, Layout)
    figure = layout_figure(shown, title=title) if is_layout else traffic_figure(shown, title=title)
    figure.savefig(path, dpi=120)
    return path


def layout_figure(layout: Layout, *, title: str = "") -> Figure:
    """One map for each kind of parameter, and the bytes on each rank by module.
    A map is the global tensor, dim 0 downwards and the dim that is cut most beside it across; a tensor of one dim is a
    strip. Every box is what some ranks hold, and boxes of the same colour are on the same ranks."""
    shown, totals = _maps(layout), totals_of(layout)
    lines = {heading: math.ceil(len(maps) / _COLUMNS) for heading, maps in shown.items()}
    bars = 3.0
    # Inches, from the top: title, for each mesh a heading and its lines of maps, then the bars.
    height = 1.05 + sum(0.45 + _LINE * count for count in lines.values()) + bars + 0.35
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    summary = f"{totals['parameters']:,} parameters on {totals['ranks']:,} ranks: {in_words(totals)}"
    _head(figure, title or "Where every parameter lives", summary, _HOW_TO_READ)
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


def _maps(layout: Layout) -> dict[str, list[tuple[list[str], ParamLayout]]]:
    """What to draw for each mesh: the names of parameters that look alike, and one of them."""
    headings = {name: f"{name.rstrip('0123456789')} mesh {mesh}" for name, mesh in layout.meshes.items()}
    stages = Counter(headings.values())
    alike: dict[tuple, tuple[Counter[str], ParamLayout]] = {}
    for fqn, param in layout.params.items():
        # Pipeline stages have a mesh each: one map stands for all, drawn for the first.
        heading = headings[param.spec.mesh]
        if stages[heading] == 1:
            heading = f"{param.spec.mesh} mesh {layout.meshes[param.spec.mesh]}"
        key = (heading, param.shape, param.spec.placements)
        alike.setdefault(key, (Counter(), param))[0][pattern_of(fqn)] += 1
    shown: dict[str, list[tuple[list[str], ParamLayout]]] = {}
    for (heading, *_), (names, param) in alike.items():
        texts = [_short(name) + (f" ×{count}" if count > 1 else "") for name, count in names.items()]
        shown.setdefault(heading, []).append((texts, param))
    return shown


def traffic_figure(plan: Plan, *, title: str = "") -> Figure:
    """Who sends how much to whom, as a matrix with the sums at its edges; small ones have the bytes in their cells."""
    index = {owner: i for i, owner in enumerate(plan.owners)}
    sources, destinations = list(plan.sent), list(plan.received)
    matrix = plan.traffic()[np.ix_([index[h] for h in sources], [index[h] for h in destinations])]
    rows, columns = matrix.shape
    values = max(rows, columns) <= _VALUES
    wide, high = (max(0.95 * columns, 4.0), max(0.5 * rows, 1.0)) if values else (8.0, 7.0)  # inches
    height = high + 4.2
    below_title = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - 1.05 / height))
    figure = Figure(figsize=(wide + 5.5, height), facecolor="white", layout=below_title)
    summary = f"{human(plan.bytes)} travel in {plan.copies_count:,} copies; "
    summary += f"the busiest sender sends {plan.balance:.3f} times the mean"
    _head(figure, title or "Who sends how much to whom", summary, _HOW_TO_READ_TRAFFIC)
    ratios = {"width_ratios": [wide, 1.6], "height_ratios": [0.75, high, 0.12]}
    received, _, grid, sent, scale, _ = figure.subplots(3, 2, gridspec_kw=ratios).flat
    for unused in (figure.axes[1], figure.axes[5]):
        unused.set_axis_off()
    masked = np.ma.masked_equal(matrix.astype(np.float64), 0)
    low, top = (masked.min(), masked.max()) if masked.count() else (1.0, 1.0)
    norm = LogNorm(vmin=low / 2, vmax=2 * top)
    image = grid.imshow(masked, aspect="auto", norm=norm, cmap="Blues", interpolation="nearest")
    for row, column in np.argwhere(matrix) if values else ():
        ink = "white" if norm(matrix[row, column]) > 0.6 else _INK
        text = human(int(matrix[row, column]))
        grid.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    for axis, names in ((grid.yaxis, _names(sources)), (grid.xaxis, _names(destinations))):
        step = max(1, math.ceil(len(names) / 16))
        axis.set_ticks(range(0, len(names), step), names[::step], fontsize=8, color=_INK)
    if max(map(len, _names(destinations)), default=0) > 8:
        grid.tick_params(axis="x", rotation=60)
    grid.set_ylabel("sender", fontsize=9, color=_FAINT)
    grid.set_xlabel("receiver", fontsize=9, color=_FAINT)
    _sums(received, grid, matrix.sum(axis=0), "received", values=values)
    _sums(sent, grid, matrix.sum(axis=1), "sent", values=values)
    if values or not masked.count():
        scale.set_axis_off()
    else:
        ticks = np.geomspace(low, top, 2 + int(math.log10(top / low)) if top / low > 2 else 1)
        figure.colorbar(image, cax=scale, orientation="horizontal", ticks=ticks, format=_BYTES)
        scale.minorticks_off()
        scale.tick_params(labelsize=8, colors=_INK)
        scale.set_xlabel("bytes of a pair", fontsize=8, color=_FAINT)
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
    axes.spines[["top", "right"]].set_visible(False)


def _names(owners: Sequence[object]) -> list[str]:
    """Ranks as numbers; files by as many of their last parts as tell them apart."""
    texts = [str(owner) for owner in owners]
    shorter = (["/".join(text.split("/")[-count:]) for text in texts] for count in range(1, 10))
    short = next((some for some in shorter if len(set(some)) == len(set(texts))), texts)
    return [text if len(text) <= 32 else "…" + text[-31:] for text in short]


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
    dims = [shard_dim(placements[i]) for i in cuts]
    # Across: the dim beside dim 0 that is cut into most parts.
    y, x = (0 if param.shape else None), max(range(1, len(param.shape)), key=dims.count, default=None)
    height, width = (1 if d is None else param.shape[d] for d in (y, x))
    rectangles = []
    for box, ranks in holders.items():
        left, top = (0 if d is None else box.start[d] for d in (x, y))
        right, bottom = (1 if d is None else box.stop[d] for d in (x, y))
        rectangles.append(Rectangle((left, top), right - left, bottom - top))
        if len(holders) <= _LABELLED:
            label = "every rank" if len(ranks) == len(mesh.ranks) > 1 else ranges(ranks)
            label = label if len(label) < 18 else f"{len(ranks)} ranks"
            turned, size = len(param.shape) < 2 and len(label) > 5, 6 if len(holders) > 8 else 9
            look = {"fontsize": size, "rotation": 90 * turned, "color": _INK, "ha": "center", "va": "center"}
            axes.text((left + right) / 2, (top + bottom) / 2, label, **look)
    line = 1.2 if len(holders) <= 16 else 0.5 if len(holders) <= 64 else 0
    look = {
        "facecolors": list(colours.values()),
        "edgecolors": "white" if line else "face",
        "linewidths": line,
    }
    axes.add_collection(PatchCollection(rectangles, **look))
    axes.set(xlim=(0, max(width, 1e-9)), ylim=(max(height, 1e-9), 0), xticks=[], yticks=[])
    axes.spines[:].set_color(_FAINT)
    slices = len({tuple(ranks) for ranks in holders.values()})
    each = human(local_numel(param, mesh).max() * itemsize(param.dtype))
    whole = "whole on every rank" if slices == 1 else f"{slices:,} slices, {each} each"
    axes.set_ylabel("" if y is None else f"dim {y}: {height:,}", fontsize=7.5, color=_FAINT)
    below = f"{'' if x is None else f'dim {x}: {width:,}'}\n{whole}"
    axes.set_xlabel(below, fontsize=7.5, color=_FAINT, loc="left")
    which = "\n".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    shape = " × ".join(f"{size:,}" for size in param.shape) or "scalar"
    how = ", ".join(f"{mesh.axes[i]} {placement_to_str(placements[i])}" for i in cuts) or "replicated"
    above = ((which, 27, _INK, "bold"), (shape, 16, _INK, "normal"), (how, 5, _CUT, "normal"))
    for text, points, ink, weight in above:
        at = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, points), "textcoords": "offset points"}
        axes.annotate(text, **at, annotation_clip=False, fontsize=8, fontweight=weight, color=ink)


def _colour(cuts: list[tuple[int, int]]) -> tuple[float, ...]:
    """Hue by the place on the outer axes that cut the tensor, lightness by that on the innermost of several."""
    if not cuts:
        return to_rgb("#e3e6ea")
    outer, (at, size) = (cuts[:-1], cuts[-1]) if len(cuts) > 1 else (cuts, (0, 1))
    white = 0.6 * at / max(size - 1, 1)
    count, place = math.prod(size for _, size in outer), 0
    for at, size in outer:
        place = place * size + at
    if count <= len(_HUES):
        hue = np.asarray(to_rgb(_HUES[place]))
    else:
        hue = np.asarray(colormaps["turbo"](0.08 + 0.84 * place / (count - 1))[:3]) * 0.75 + 0.25
    return tuple(hue * (1 - white) + white)


def _short(name: str) -> str:
    """The last two parts of a name, with which people tell modules apart: "inner_experts.w1_EFD"."""
    parts = [part for part in name.removesuffix(".weight").split(".") if part not in ("layers", "*")]
    short = ".".join(parts[-2:]) or name
    return short if len(short) <= 27 else "…" + short[-26:]


def _bars(axes: Axes, layout: Layout) -> None:
    """Bytes on each rank, stacked by module."""
    load = load_of(layout)
    modules = sorted(_by_module(layout).items(), key=lambda item: -item[1].sum())
    shown = [(module, size) for module, size in modules[:_MODULES] if size.any()]
    if rest := [size for _, size in modules[_MODULES:]]:
        shown.append(("others", np.sum(rest, axis=0)))
    edges = np.arange(len(load) + 1) - 0.5
    total = max(sum(load.values()), 1)
    labels = [f"{module}  {human(size.max())}  {size.sum() / total:.0%}" for module, size in shown]
    # One outline for each module: bars of their own take seconds at a thousand ranks.
    heights = [np.append(size, size[-1]) for _, size in shown]
    axes.stackplot(edges, heights, labels=labels, step="post", colors=_HUES)
    limit = float(max(load.values(), default=1)) or 1.0
    axes.set_title("bytes on each rank, by module", fontsize=11, fontweight="bold", loc="left", color=_INK)
    if len(load) <= 64:
        axes.vlines(edges, 0, limit, color="white", linewidth=2)
    axes.set(ylim=(0, limit * 1.05), xlim=(-0.5, len(load) - 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(32, len(load)), integer=True))
    names = dict(enumerate(map(str, load)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: names.get(int(value), "")))
    axes.yaxis.set_major_formatter(_BYTES)
    axes.set_xlabel("rank", fontsize=8)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _by_module(layout: Layout) -> dict[str, np.ndarray]:
    """int64 bytes on each rank by the module that holds them, two names deep: "attention.wo"."""
    modules: dict[str, dict[str, ParamLayout]] = {}
    for fqn, param in layout.params.items():
        parts = [part for part in pattern_of(fqn).split(".") if part not in ("layers", "*", "weight", "bias")]
        modules.setdefault(".".join(parts[:2]) or fqn, {})[fqn] = param
    loads = {module: load_of(replace(layout, params=own)) for module, own in modules.items()}
    return {module: np.array(list(load.values()), dtype=np.int64) for module, load in loads.items()}
