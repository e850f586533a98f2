"""Pipeline stages without an engine: who has which parameter, how ranks are numbered, and plans."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_parallelize_specs import MODELS
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes, describe, in_order, mesh_axes
from titan_bridge.model_layout import layout
from titan_bridge.sharding.layout import Layout
from titan_bridge.sharding.plan import plan
from titan_bridge.sharding.show import load_of


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_ranks_are_numbered_as_vllm_does(dp: int, pp: int, tp: int) -> None:
    """Its `initialize_model_parallel`: dp outside of pp outside of tp, and ep over dp and tp of one stage."""
    sizes = Sizes(dp=dp, pp=pp, tp=tp, ep=dp * tp, dp_outside=True)
    ranks = np.arange(dp * pp * tp).reshape(dp, pp, tp)
    for d, s, t in np.ndindex(ranks.shape):
        rank = int(ranks[d, s, t])
        assert sizes.stage_at(rank) == s
        line = {name: describe(name, sizes, rank=rank).flat_ranks() for name in ("dp", "pp", "tp", "ep")}
        assert line["dp"] == tuple(ranks[:, s, t])
        assert line["pp"] == tuple(ranks[d, :, t])
        assert line["tp"] == tuple(ranks[d, s, :])
        assert line["ep"] == tuple(ranks[:, s, :].ravel())
        for name in ("dense", f"dense_pp{s}", "sparse", f"sparse_pp{s}"):
            mesh = describe(name, sizes, rank=rank)
            assert mesh.flat_ranks() == tuple(ranks[:, s, :].ravel())
            assert mesh.coordinate(rank)[-2:] == ((0, d * tp + t) if name.startswith("s") else (d, t))


def test_meshes_of_stages_have_names_that_say_which() -> None:
    assert mesh_axes("dense_tp2_pp1") == ("dp_replicate", "fsdp", "tp_replicate", "tp")
    assert mesh_axes("dense_pp0_3") == ("pp", "dp_replicate", "fsdp", "tp")
    names = ["dense_tp2_pp1", "sparse_pp0", "dense_pp1", "dense_tp4_pp0", "dense_pp0"]
    assert in_order(names) == ("dense_pp0", "dense_pp1", "sparse_pp0", "dense_tp4_pp0", "dense_tp2_pp1")
    sizes = Sizes(pp=4, tp=2, stages=(1, 1, 1, 1), dp_outside=True)
    assert describe("dense_pp0_3", sizes).shape == (2, 1, 1, 2)
    assert describe("dense_pp0_3", sizes).flat_ranks() == (0, 1, 6, 7)
    for name in ("tp_pp0", "fdsp_pp1"):
        with pytest.raises(BridgeError, match=f"there is no mesh '{name}'"):
            mesh_axes(name)
    with pytest.raises(BridgeError, match="'dense_pp4' is of stage 4; there are 4"):
        describe("dense_pp4", sizes)
    with pytest.raises(BridgeError, match="stages of 2, 0 layers; give at least 1 to each of pp=2"):
        Sizes(pp=2, stages=(2, 0))
    with pytest.raises(BridgeError, match="pp=2: which stage holds which layer is not known here"):
        layout(MODELS["llama3"], Sizes(pp=2))


def staged(name: str, **fields: object) -> tuple[dict, Layout, Sizes]:
    """The model `name` with three layers in stages of two and one, over two tp ranks and two dp ranks."""
    hf = {**MODELS[name], "num_hidden_layers": 3, **fields}
    experts = "num_experts" in hf or "n_routed_experts" in hf or "num_local_experts" in hf
    sizes = Sizes(pp=2, tp=2, dp=2, ep=4 if experts else 1, stages=(2, 1), dp_outside=True)
    return hf, layout(hf, sizes), sizes


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_stage_holds_its_layers_and_the_rest_is_at_the_ends(name: str) -> None:
    hf, found, sizes = staged(name)
    whole = layout(hf, Sizes(tp=2, dp=2, ep=sizes.ep))
    assert found.params.keys() == whole.params.keys()
    tied = "lm_head.weight" not in found.params
    for fqn, param in found.params.items():
        first = 0 if fqn.startswith(("tok_embeddings.", "layers.0.", "layers.1.")) else 1
        stages = (0, 1) if tied and fqn.startswith("tok_embeddings.") else (first,)
        mesh, alone = found.mesh_of(fqn), whole.mesh_of(fqn)
        assert {sizes.stage_at(rank) for rank in mesh.ranks} == set(stages)
        assert len(mesh.ranks) == len(stages) * len(alone.ranks)
        assert param.spec.placements[len(mesh.shape) - len(alone.shape) :] == whole.param(fqn).spec.placements
    assert Layout.from_json(found.to_json()) == found


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_plan_gives_each_stage_what_it_holds_and_takes_it_from_there(name: str) -> None:
    hf, found, _ = staged(name)
    load = load_of(found)
    other = layout(hf, Sizes(tp=4))
    there = plan(other, found)
    assert there.received == load
    back = plan(found, other)
    assert back.bytes == back.lower_bound
    for copy in back.copies():
        assert copy.source in found.mesh_of(copy.source_name).ranks
    assert plan(found, found, colocated=True).bytes == 0
