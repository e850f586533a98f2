"""Tables and pictures say what the layout says."""

from __future__ import annotations

import io
import itertools
import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

from tests.unit.sharding_samples import chunked, tensor, whole
from tests.unit.test_sharding_boxes import shardings
from titan_bridge.errors import BridgeError
from titan_bridge.sharding import Layout, MeshLayout, ParamLayout, ShardingSpec, placement_from_str
from titan_bridge.sharding.boxes import Box
from titan_bridge.sharding.layout import torch_dtype
from titan_bridge.sharding.picture import layout_figure, picture, traffic_figure
from titan_bridge.sharding.plan import plan
from titan_bridge.sharding.show import (
    human,
    layout_rows,
    layout_table,
    load_of,
    local_numel,
    pattern_of,
    plan_summary,
    plan_tables,
    totals_of,
)


def param(mesh, shape, *placements):
    spec = ShardingSpec(mesh=mesh, placements=tuple(map(placement_from_str, placements)))
    return ParamLayout(spec=spec, shape=shape, dtype="bfloat16")


def example() -> Layout:
    params = {"tok_embeddings.weight": param("dense", (7, 4), "SS(0,2)", "S(0)")}
    for i in range(12):
        params[f"layers.{i}.attention.wo.weight"] = param("dense", (4, 6), "S(0)", "S(1)")
        params[f"layers.{i}.moe.experts.w1_EFD"] = param("sparse", (3, 4, 2), "S(0)")
    params["norm.weight"] = param("dense", (4,), "R", "R")
    return Layout(
        meshes={
            "dense": MeshLayout.make(("fsdp", "tp"), (2, 2)),
            "sparse": MeshLayout.make(("ep",), (2,), [3, 5]),
        },
        params=params,
    )


def printed(*tables) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200)
    for table in tables:
        console.print(table)
    return out.getvalue()


@settings(max_examples=100, deadline=None)
@given(shardings())
def test_elements_at_every_position(sharding):
    placements, shape, mesh_shape = sharding
    mesh = MeshLayout.make([f"a{i}" for i in range(len(mesh_shape))], mesh_shape)
    spec = ShardingSpec(mesh="m", placements=placements)
    held = local_numel(ParamLayout(spec=spec, shape=shape, dtype="int8"), mesh)
    for coordinate in np.ndindex(*mesh_shape):
        assert held[coordinate] == sum(
            piece.box.numel for piece in spec.pieces(shape, mesh_shape, coordinate)
        )


def test_load_is_the_sum_of_all_boxes():
    layout = example()
    load = load_of(layout)
    for rank, nbytes in load.items():
        assert nbytes == 2 * sum(
            piece.box.numel for fqn in layout.params for piece in layout.pieces(fqn, rank)
        )
    totals = totals_of(layout)
    assert totals["most_loaded"] == {"rank": 3, "bytes": load[3]}
    assert load[3] == max(load.values())
    assert totals["least_loaded"]["bytes"] == min(load.values())


def test_totals():
    totals = totals_of(example())
    assert totals["parameters"] == 28 + 12 * (24 + 24) + 4
    assert totals["global_bytes"] == 2 * totals["parameters"]
    assert totals["all_ranks_bytes"] == sum(load_of(example()).values())
    assert totals["tensors"] == 26
    assert totals["ranks"] == 5


def test_rows_of_one_rank():
    rows = {row["name"]: row for row in layout_rows(example(), 3)}
    assert len(rows) == 26
    row = rows["layers.7.moe.experts.w1_EFD"]
    assert (row["local_shape"], row["rank_bytes"], row["max_rank_bytes"]) == ([2, 4, 2], 32, 32)
    assert layout_rows(example(), 1)[-1]["local_shape"] == [4]
    absent = {row["name"]: row for row in layout_rows(example(), 5)}["norm.weight"]
    assert absent["local_shape"] is None
    assert absent["rank_bytes"] == 0
    with pytest.raises(BridgeError, match="rank 4 is not in the layout"):
        layout_rows(example(), 4)


def test_layers_are_one_row():
    rows = {row["name"]: row["count"] for row in layout_rows(example(), collapse=True)}
    assert rows == {
        "tok_embeddings.weight": 1,
        "layers.*.attention.wo.weight": 12,
        "layers.*.moe.experts.w1_EFD": 12,
        "norm.weight": 1,
    }
    assert pattern_of("layers.3.moe.experts.12.w1") == "layers.*.moe.experts.*.w1"
    assert pattern_of("0.w1_2") == "*.w1_2"


def test_the_table_says_it():
    text = printed(layout_table(example()))
    for word in ("layers.*.attention.wo.weight", "x12", "4 x 6", "SS(0,2), S(0)", "most: rank 3", "2 x 3"):
        assert word in text
    assert "not there" in printed(layout_table(example(), 5, collapse=False))


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (2e9, "2.00 GB"), (5e16, "50000.00 TB")],
)
def test_human(nbytes, text):
    assert human(nbytes) == text


def example_plan():
    source = example()
    return plan(
        source,
        [whole(n, p.shape, torch_dtype(p.dtype), "a", "b") for n, p in source.params.items()],
    )


def test_summary_of_a_plan():
    result = example_plan()
    summary = plan_summary(result, pairs=3)
    assert sum(summary["by_group"].values()) == summary["bytes"] == result.bytes
    assert set(summary["by_group"]) == {pattern_of(name) for name in example().params}
    assert [pair["bytes"] for pair in summary["largest_pairs"]] == sorted(result.traffic().ravel())[:-4:-1]
    text = printed(*plan_tables(result))
    assert "layers.*.attention.wo.weight" in text
    assert human(result.bytes) in text


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_pictures(tmp_path, suffix):
    """A readable picture with the names in it, for a layout and for the traffic of a plan."""
    layout, traffic = tmp_path / f"layout.{suffix}", tmp_path / f"traffic.{suffix}"
    assert picture(example(), layout, title="a model") == layout
    assert picture(example_plan(), traffic) == traffic
    for path in (layout, traffic):
        if suffix == "svg":
            assert len(list(ET.parse(path).iter())) > 100
        else:
            with Image.open(path) as image:
                assert len(image.convert("L").getcolors()) > 10
    with pytest.raises(BridgeError, match="must end in one of"):
        picture(example(), tmp_path / "layout.txt")


FILE = "/a/long/folder/model-00001-of-00099.tensors."


def texts_of(figure) -> dict[str, list]:
    """Where each visible text of a figure is: text -> boxes in pixels."""
    FigureCanvasAgg(figure).draw()
    found: dict[str, list] = {}
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible()):
        if text.get_text().strip():
            found.setdefault(text.get_text(), []).append(text.get_window_extent())
    return found


def is_readable(figure) -> None:
    """No text lies on another, and none outside of the picture."""
    boxes = [(text, box) for text, boxes in texts_of(figure).items() for box in boxes]
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), (one, other)


def test_dim_0_is_always_vertical_and_a_tensor_of_one_dim_is_a_strip():
    layout = example()
    layout = replace(layout, params=layout.params | {"layers.0.w1_EFD": param("sparse", (3, 4, 2), "S(1)")})
    layout = replace(layout, params=layout.params | {"layers.0.w2_EDF": param("sparse", (3, 4, 2), "S(2)")})
    figure = layout_figure(layout, title="a model: tp=2")
    is_readable(figure)
    assert "a model: tp=2" in texts_of(figure)
    maps = [axes for axes in figure.axes if axes.get_ylabel().startswith("dim ")]
    assert len(maps) == 6
    across = {}
    for axes in maps:
        shape = next(
            child.get_text() for child in axes.texts if " × " in child.get_text() or child.get_text() == "4"
        )
        length = int(shape.split(" × ")[0])
        assert axes.get_ylabel() == f"dim 0: {length}"
        assert axes.get_ylim() == (length, 0)  # the first row is above
        across.setdefault(shape, []).append(axes.get_xlabel().splitlines()[0])
        wide = axes.get_position().width * figure.get_size_inches()[0]
        assert (wide < 0.8) == (shape == "4")
    assert across["4"] == [""]
    assert across["3 × 4 × 2"] == ["dim 1: 4", "dim 1: 4", "dim 2: 2"]


@pytest.mark.parametrize(
    ("senders", "receivers", "file"),
    [(2, 4, ""), (1, 1, ""), (12, 12, FILE), (3, 64, FILE), (64, 64, "")],
)
def test_a_picture_of_traffic_has_units_and_no_text_on_another(senders, receivers, file):
    count = math.lcm(senders, receivers) * 1000
    source, target = (
        [tensor(name="w", shape=(count,), dtype=torch.int8, by=chunked(tuple(
            (f"{name}{i}" if name else i, Box(start=(i * count // n,), stop=((i + 1) * count // n,))) for i in range(n)
        )))]
        for n, name in ((senders, file), (receivers, ""))
    )  # fmt: skip
    made = plan(source, target)
    figure = traffic_figure(made, title="from here to there")
    is_readable(figure)
    texts = texts_of(figure)
    assert "from here to there" in texts
    assert "sender" in texts
    assert "received" in texts
    each = human(count // max(senders, receivers))
    if max(senders, receivers) <= 12:
        (grid,) = (axes for axes in figure.axes if axes.images)
        assert [text.get_text() for text in grid.texts] == [each] * max(senders, receivers)
    assert human(count // receivers) in texts  # the largest sum, on its bar or on the axis
    assert not any("10^" in text or "\\times" in text for text in texts)  # bytes have units everywhere


def test_pictures_of_little(tmp_path):
    """A scalar, a rank without rows, a plan in which nothing travels."""
    mesh = {"m": MeshLayout.make(("tp",), (3,))}
    layout = Layout(meshes=mesh, params={"scale": param("m", (), "R"), "w": param("m", (2,), "S(0)")})
    picture(layout, tmp_path / "a.png")
    nothing = plan(layout, layout, colocated=True)
    assert nothing.bytes == 0
    assert math.isclose(nothing.balance, 1.0)
    picture(nothing, tmp_path / "b.png")
    assert plan_summary(nothing)["largest_pairs"] == []
