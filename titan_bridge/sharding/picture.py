"""Pictures: which rank holds which part of each tensor, and who sends how much to whom, as SVG, PNG or PDF."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from torch.distributed.tensor import Replicate

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.boxes import Box, boxes_of
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout, itemsize
from titan_bridge.sharding.plan import Plan
from titan_bridge.sharding.show import human, load_of, local_numel, pattern_of
from titan_bridge.sharding.spec import placement_to_str

_COLUMNS = 5
_LABELLED = 32
"""Boxes in one map that still leave room for rank numbers."""
_FORMATS = (".svg", ".png", ".pdf")
_BYTES = FuncFormatter(lambda value, _: human(value).replace(".00", ""))


def layout_picture(layout: Layout, path: str | Path, *, title: str = "") -> Path:
    """Draw one map for each kind of parameter, and the bytes on each rank by module.

    A map is the global tensor, seen along its sharded dims; every box is what some ranks hold, and boxes of the same
    colour are on the same ranks. Returns `path`. Raises BridgeError for another file type than svg, png or pdf.
    """
    path = _checked(path)
    shown = _maps(layout)
    rows = sum(math.ceil(len(maps) / _COLUMNS) for maps in shown.values())
    # Inches, from the top: title, for each mesh a heading and its maps, then the bars.
    height = 0.5 + 2.6 * rows + 0.4 * len(shown) + 3.4
    figure = Figure(figsize=(15.5, height))
    figure.suptitle(title or f"{len(layout.params)} tensors on {len(layout.ranks)} ranks", fontsize=13)
    top = height - 0.5
    for heading, maps in shown.items():
        figure.text(0.035, (top - 0.25) / height, f"mesh {heading}", fontsize=10, fontweight="bold")
        top -= 0.4
        lines = math.ceil(len(maps) / _COLUMNS)
        grid = figure.add_gridspec(
            lines,
            _COLUMNS,
            left=0.045,
            right=0.985,
            top=(top - 0.45) / height,
            bottom=(top - 2.6 * lines + 0.3) / height,
            wspace=0.3,
            hspace=0.55,
        )
        for at, (names, param) in enumerate(maps):
            _map(figure.add_subplot(grid[at]), names, param, layout.meshes[param.spec.mesh])
        top -= 2.6 * lines
    bars = figure.add_gridspec(1, 1, left=0.07, right=0.85, top=2.8 / height, bottom=0.55 / height)
    _bars(figure.add_subplot(bars[0]), layout)
    figure.savefig(path)
    return path


def _maps(layout: Layout) -> dict[str, list[tuple[list[str], ParamLayout]]]:
    """What to draw for each mesh: the names of parameters that look alike, and one of them."""
    alike: dict[tuple, tuple[dict[str, int], ParamLayout]] = {}
    for fqn, param in layout.params.items():
        # Pipeline stages have a mesh each: one map stands for all, drawn for the first.
        mesh = layout.meshes[param.spec.mesh]
        key = (f"{_family(param.spec.mesh)} {mesh}", param.shape, param.spec.placements)
        names, _ = alike.setdefault(key, ({}, param))
        names[pattern_of(fqn)] = names.get(pattern_of(fqn), 0) + 1
    shown: dict[str, list[tuple[list[str], ParamLayout]]] = {}
    for (heading, *_), (names, param) in alike.items():
        texts = [_short(name) + (f" x{count}" if count > 1 else "") for name, count in names.items()]
        shown.setdefault(heading, []).append((texts, param))
    return shown


def traffic_picture(plan: Plan, path: str | Path, *, title: str = "") -> Path:
    """Draw who sends how much to whom as a matrix, with the sums at its edges. Returns `path`; raises as above."""
    path = _checked(path)
    index = {holder: i for i, holder in enumerate(plan.holders)}
    sources, destinations = list(plan.sent), list(plan.received)
    matrix = plan.traffic()[np.ix_([index[h] for h in sources], [index[h] for h in destinations])]
    figure = Figure(figsize=(9, 8), layout="constrained")
    figure.suptitle(title or f"{human(plan.bytes)} travel; most loaded sender over mean {plan.balance:.3f}")
    grid = figure.add_gridspec(2, 2, width_ratios=[5, 1], height_ratios=[1, 5])
    main = figure.add_subplot(grid[1, 0])
    above = figure.add_subplot(grid[0, 0], sharex=main)
    beside = figure.add_subplot(grid[1, 1], sharey=main)
    masked = np.ma.masked_equal(matrix.astype(np.float64), 0)
    norm = LogNorm(vmin=masked.min(), vmax=masked.max()) if masked.count() else None
    image = main.imshow(masked, aspect="auto", norm=norm, cmap="viridis", interpolation="nearest")
    _ticks(main, sources, destinations)
    main.set_xlabel("receiver")
    main.set_ylabel("sender")
    above.bar(range(len(destinations)), matrix.sum(axis=0), width=1, color="tab:green")
    beside.barh(range(len(sources)), matrix.sum(axis=1), height=1, color="tab:blue")
    above.set_ylabel("received")
    beside.set_xlabel("sent")
    above.yaxis.set_major_formatter(_BYTES)
    beside.xaxis.set_major_formatter(_BYTES)
    beside.tick_params(axis="x", rotation=45)
    above.tick_params(labelbottom=False)
    beside.tick_params(labelleft=False)
    if norm is not None:
        figure.colorbar(
            image,
            ax=[main, beside],
            location="bottom",
            shrink=0.6,
            format=_BYTES,
            ticks=LogLocator(numticks=7),
        ).ax.tick_params(which="minor", bottom=False)
    figure.savefig(path)
    return path


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise BridgeError(f"picture {path}: the name must end in one of {', '.join(_FORMATS)}")
    return path


def _family(mesh: str) -> str:
    return mesh.rstrip("0123456789")


def _map(axes: Axes, names: list[str], param: ParamLayout, mesh: MeshLayout) -> None:
    """One tensor, seen along the two dims that matter most."""
    holders: dict[Box, list[int]] = {}
    for coordinate in np.ndindex(*mesh.shape):
        for box in boxes_of(param.spec.placements, param.shape, mesh.shape, coordinate):
            holders.setdefault(box, []).append(int(mesh.array[coordinate]))
    sharded = sorted({p.dim for p in param.spec.placements if not isinstance(p, Replicate)})
    others = [d for d in range(len(param.shape)) if d not in sharded]
    y, x = ([*sharded, *others, None, None])[:2]
    height, width = (1 if d is None else param.shape[d] for d in (y, x))
    groups = sorted({tuple(ranks) for ranks in holders.values()})
    hue = {ranks: i for i, ranks in enumerate(groups)}
    palette = colormaps["turbo"](np.linspace(0.08, 0.92, len(groups)))
    patches, colours = [], []
    for box, ranks in holders.items():
        top, bottom = (0, 1) if y is None else (box.start[y], box.stop[y])
        left, right = (0, 1) if x is None else (box.start[x], box.stop[x])
        patches.append(Rectangle((left, top), right - left, bottom - top))
        colours.append(palette[hue[tuple(ranks)]])
        if len(holders) <= _LABELLED:
            small = len(holders) > 8
            label = _ranges(ranks)
            axes.text(
                (left + right) / 2,
                (top + bottom) / 2,
                label if len(label) < 18 else f"{len(ranks)} ranks",
                ha="center",
                va="center",
                fontsize=5 if small else 7,
            )
    line = 0.6 if len(holders) <= 256 else 0
    axes.add_collection(
        PatchCollection(patches, facecolors=colours, edgecolors="white", linewidths=line, alpha=0.75)
    )
    axes.set_xlim(0, max(width, 1e-9))
    axes.set_ylim(max(height, 1e-9), 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("" if x is None else f"dim {x}: {width:,}", fontsize=7)
    axes.set_ylabel("" if y is None else f"dim {y}: {height:,}", fontsize=7)
    placements = ", ".join(placement_to_str(p) for p in param.spec.placements)
    # Two lines of names at most: the map shows the layout, not the list.
    listed = "\n".join([", ".join(names[:2]), ", ".join(names[2:4])]).strip() + (
        ", ..." if len(names) > 4 else ""
    )
    axes.set_title(f"{listed}\n{list(param.shape)}  {placements}", fontsize=7)


def _short(name: str) -> str:
    name = name.removeprefix("layers.*.").removesuffix(".weight")
    return name if len(name) <= 34 else "..." + name[-31:]


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
    at = {rank: i for i, rank in enumerate(load.ranks)}
    modules: dict[str, np.ndarray] = {}
    known: dict[ParamLayout, np.ndarray] = {}
    for fqn, param in layout.params.items():
        if param not in known:
            mesh = layout.meshes[param.spec.mesh]
            known[param] = np.zeros(len(at), dtype=np.int64)
            known[param][[at[rank] for rank in mesh.ranks]] = local_numel(param, mesh).ravel() * itemsize(
                param.dtype
            )
        parts = [part for part in pattern_of(fqn).split(".") if part not in ("layers", "*", "weight", "bias")]
        # The container of a module's own parameter, two names deep: "moe.experts", "attention.wo".
        module = ".".join(parts[:2]) or fqn
        modules[module] = modules.get(module, 0) + known[param]
    largest = sorted(modules, key=lambda module: -int(modules[module].sum()))
    bottom = np.zeros(len(at), dtype=np.int64)
    colours = colormaps["tab20"].colors
    edges = np.arange(len(at) + 1) - 0.5
    for i, module in enumerate([*largest[:9], "others"]):
        members = largest[9:] if module == "others" else [module]
        height = sum((modules[member] for member in members), np.zeros(len(at), dtype=np.int64))
        if height.any():
            # One outline for each module: bars of their own take seconds at a thousand ranks.
            axes.stairs(bottom + height, edges, baseline=bottom, fill=True, label=module, color=colours[i])
            bottom = bottom + height
    if len(at) <= 64:
        axes.vlines(edges, 0, bottom.max(initial=0), color="white", linewidth=2)
    most, least = load.most, load.least
    spread = f"most {human(most[1])} on rank {most[0]}, least {human(least[1])} on rank {least[0]}"
    if most[1] == least[1]:
        spread = f"{human(most[1])}, the same on all"
    axes.set_title(f"bytes on each rank: {spread}", fontsize=9)
    axes.set_ylim(0, bottom.max(initial=1) * 1.05)
    axes.set_xlim(-0.5, len(at) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(32, len(at)), integer=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: str(load.ranks[int(value)]) if 0 <= value < len(at) else "")
    )
    axes.yaxis.set_major_formatter(_BYTES)
    axes.set_xlabel("rank")
    axes.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _ticks(axes: Axes, sources: list, destinations: list) -> None:
    for axis, names in ((axes.yaxis, sources), (axes.xaxis, destinations)):
        step = max(1, math.ceil(len(names) / 16))
        axis.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]], fontsize=7)
    if any(isinstance(name, str) for name in destinations):
        axes.tick_params(axis="x", rotation=60)
