"""The layout file: what is written is read, and nothing else is."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_sharding_boxes import shardings
from titan_bridge.errors import BridgeError
from titan_bridge.sharding import Layout, MeshLayout, ParamLayout, ShardingSpec, placement_from_str


def param(mesh, placements, shape, dtype="bfloat16"):
    spec = ShardingSpec(mesh=mesh, placements=tuple(map(placement_from_str, placements)))
    return ParamLayout(spec=spec, shape=shape, dtype=dtype)


def example() -> Layout:
    return Layout(
        meshes={
            "dense": MeshLayout.make(("dp_replicate", "fsdp", "tp"), (1, 2, 2)),
            "sparse": MeshLayout.make(("efsdp", "ep"), (2, 2), [[3, 2], [1, 0]]),
        },
        params={
            "wq": param("dense", ["R", "SS(0,2)", "S(0)"], (8, 4)),
            "norm": param("dense", ["R", "R", "R"], (4,)),
            "w1": param("sparse", ["S(1)", "S(0)"], (4, 6, 4), "float32"),
        },
    )


def test_json_is_the_contract(tmp_path):
    path = tmp_path / "layout.json"
    example().write(path)
    data = json.loads(path.read_text())
    assert data["version"] == 1
    assert data["meshes"]["sparse"] == {"axes": ["efsdp", "ep"], "shape": [2, 2], "ranks": [[3, 2], [1, 0]]}
    assert data["params"]["wq"] == {
        "mesh": "dense",
        "placements": ["R", "SS(0,2)", "S(0)"],
        "shape": [8, 4],
        "dtype": "bfloat16",
    }
    assert Layout.read(path) == example()
    assert example() == Layout.read(path)


@settings(max_examples=100, deadline=None)
@given(st.lists(shardings(), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_any_layout_survives_the_file(parts, random):
    meshes, params = {}, {}
    for i, (placements, shape, mesh_shape) in enumerate(parts):
        mesh = MeshLayout.make([f"a{axis}" for axis in range(len(mesh_shape))], mesh_shape)
        ranks = random.sample(range(1000), len(mesh.ranks))
        meshes[f"m{i}"] = MeshLayout.make(mesh.axes, mesh.shape, ranks)
        params[f"p{i}"] = ParamLayout(
            spec=ShardingSpec(mesh=f"m{i}", placements=placements), shape=shape, dtype="float32"
        )
    layout = Layout(meshes=meshes, params=params)
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_what_a_rank_holds():
    layout = example()
    assert layout.ranks == (0, 1, 2, 3)
    assert layout.local_shape("w1", 3) == (2, 3, 4)
    assert [piece.box.start for piece in layout.pieces("w1", 0)] == [(2, 3, 0)]
    assert layout.local_shape("w1", 7) is None
    assert layout.pieces("w1", 7) == ()
    with pytest.raises(BridgeError, match="no parameter 'wz'"):
        layout.pieces("wz", 0)


def change(data, path, value):
    data = copy.deepcopy(data)
    at = data
    for key in path[:-1]:
        at = at[key]
    if value is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("version",), 2, "version 2; this release reads version 1"),
        (("version",), True, "version True"),
        (("extra",), 1, "unknown 'extra'"),
        (("params",), [], "must be an object"),
        (("meshes", "dense", "shape"), KeyError, "mesh dense: missing 'shape'"),
        (("meshes", "dense", "axes"), ["a", "a", "b"], "distinct axes"),
        (("meshes", "dense", "axes"), "abc", "list of names"),
        (("meshes", "dense", "shape"), [1, 4, 1], "nested as the shape"),
        (("meshes", "dense", "shape"), [1, 2, True], "whole numbers"),
        (("meshes", "dense", "ranks"), [[[0, 1], [2, 2]]], "distinct"),
        (("meshes", "dense", "ranks"), [[[0, 1], [2, -1]]], "not negative"),
        (("meshes", "dense", "ranks"), [[[0, 1], [2, "3"]]], "whole numbers"),
        (("params", "wq", "mesh"), "pp", r"wq lives on mesh 'pp'; there are \['dense', 'sparse'\]"),
        (("params", "wq", "mesh"), 3, "wq: mesh is 3"),
        (("params", "wq", "placements"), ["R", "S(0)"], "2 placements for a mesh with 3 axes"),
        (("params", "wq", "placements"), ["R", "S(0)", "S(2)"], "wq: .*shards dim 2"),
        (("params", "wq", "placements"), ["R", "S(0)", "P"], "wq: placement 'P'"),
        (("params", "wq", "placements"), "R", "must be a list"),
        (("params", "wq", "shape"), [8.0, 4], "whole numbers"),
        (("params", "wq", "shape"), [-8, 4], "not a tensor's shape"),
        (("params", "wq", "dtype"), "bf16", "'bf16' is not a torch dtype"),
        (("params", "wq", "dtype"), "nn", "not a torch dtype"),
        (("params", "wq", "extra"), 0, "wq: unknown 'extra'"),
    ],
)
def test_a_wrong_layout_is_refused_by_name(path, value, says):
    with pytest.raises(BridgeError, match=says):
        Layout.from_json(change(example().to_json(), path, value))


@pytest.mark.parametrize("text", ["", "[1, 2", '{"version": 1, "version": 1}', '"x"', "null"])
def test_a_file_that_is_no_layout(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(BridgeError, match=r"x\.json"):
        Layout.read(path)
    with pytest.raises(BridgeError, match=r"nothing\.json"):
        Layout.read(tmp_path / "nothing.json")
