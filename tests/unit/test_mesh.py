"""Sizes and named meshes as plain numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_bridge.errors import BridgeError
from titan_bridge.mesh import (
    MESHES,
    Sizes,
    check_divides,
    describe,
    divisors,
    mesh_axes,
    padded_vocab,
)
from titan_bridge.models import family_for

QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 777,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "mlp_only_layers": [1],
}


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    dp, tp = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 4]))
    return Sizes(
        dp=dp,
        tp=tp,
        ep=draw(st.sampled_from(divisors(dp * tp))),
        dp_replicate=draw(st.integers(1, 3)),
        pp=draw(st.integers(1, 2)),
    )


@given(sizes())
def test_dense_and_sparse_meshes_are_two_shapes_of_the_same_consecutive_ranks(sizes: Sizes) -> None:
    stage = sizes.world // sizes.pp
    for rank in range(sizes.world):
        meshes = {name: describe(name, sizes, rank=rank) for name in sizes.meshes}
        first = rank // stage * stage
        for name in ("dense", "sparse"):
            assert meshes[name].flat_ranks() == tuple(range(first, first + stage))
            assert rank in meshes[name].flat_ranks()


@given(sizes())
def test_a_rank_has_the_coordinates_of_vllms_rank_order(sizes: Sizes) -> None:
    for rank in range(sizes.world):
        meshes = {name: describe(name, sizes, rank=rank) for name in sizes.meshes}
        replica, dp_rank, tp_rank = meshes["dense"].coordinate(rank)
        (pp_rank,) = meshes["pp"].coordinate(rank)
        assert rank == ((pp_rank * sizes.dp_replicate + replica) * sizes.dp + dp_rank) * sizes.tp + tp_rank
        assert meshes["sparse"].coordinate(rank)[0] == replica
        efsdp_rank, ep_rank = meshes["sparse"].coordinate(rank)[1:]
        assert efsdp_rank * sizes.ep + ep_rank == dp_rank * sizes.tp + tp_rank


@given(sizes(), st.sampled_from(["dp", "tp", "ep", "pp"]))
def test_the_lines_of_a_1d_mesh_partition_the_world(sizes: Sizes, name: str) -> None:
    lines = {describe(name, sizes, rank=rank).flat_ranks() for rank in range(sizes.world)}
    assert sorted(rank for line in lines for rank in line) == list(range(sizes.world))
    assert {len(line) for line in lines} == {sizes.axis(name)}


@given(sizes())
def test_a_1d_line_is_the_rank_s_slice_of_the_mesh_with_that_axis(sizes: Sizes) -> None:
    for rank in range(sizes.world):
        for name, mesh_name in (("tp", "dense"), ("ep", "sparse")):
            mesh = describe(mesh_name, sizes, rank=rank)
            *outer, _ = mesh.coordinate(rank)
            row = mesh.ranks
            for position in outer:
                row = row[position]
            assert describe(name, sizes, rank=rank).ranks == row


def test_ranks_are_nested_as_the_mesh_is() -> None:
    assert describe("dense", Sizes(dp=2, tp=2, ep=4)).ranks == (((0, 1), (2, 3)),)
    assert describe("sparse", Sizes(dp=2, tp=2, ep=2)).ranks == (((0, 1), (2, 3)),)
    assert describe("dp", Sizes(dp=2, tp=2), rank=3).ranks == (1, 3)


@pytest.mark.parametrize(
    ("given_sizes", "message"),
    [
        ({"dp": 2, "tp": 2, "ep": 3}, "ep=3 does not divide dp*tp=4; allowed with dp=2, tp=2: 1, 2, 4"),
        ({"tp": 0}, "tp=0 is not a size; give an integer of at least 1"),
        ({"dp": True}, "dp=True is not a size; give an integer of at least 1"),
    ],
)
def test_impossible_sizes_are_refused_with_what_is_allowed(given_sizes: dict[str, int], message: str) -> None:
    with pytest.raises(BridgeError) as caught:
        Sizes(**given_sizes)
    assert str(caught.value) == message


def test_names_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(BridgeError, match=r"no mesh 'fdsp'; allowed: dense, sparse, dp, tp, ep, pp"):
        describe("fdsp", Sizes())
    with pytest.raises(
        BridgeError, match="no mesh axis 'cp'; allowed: dp, dp_replicate, efsdp, ep, fsdp, pp, tp"
    ):
        Sizes().axis("cp")
    with pytest.raises(BridgeError, match="rank 4 is outside the world of 4; allowed: 0 to 3"):
        describe("dense", Sizes(dp=2, tp=2), rank=4)
    with pytest.raises(BridgeError, match="rank 5 is not in mesh 'tp'"):
        describe("tp", Sizes(dp=2, tp=2)).coordinate(5)


def test_every_axis_of_every_mesh_has_a_size() -> None:
    for mesh, axes in ((name, mesh_axes(name)) for name in MESHES):
        assert describe(mesh, Sizes(dp=4, tp=2, ep=2, dp_replicate=3)).shape == tuple(
            Sizes(dp=4, tp=2, ep=2, dp_replicate=3).axis(axis) for axis in axes
        )


@pytest.mark.parametrize(
    ("given_sizes", "message"),
    [
        (
            {"tp": 8},
            "tp=8 does not divide n_kv_heads=4; allowed for this model: 1, 2, 4",
        ),
        (
            {"dp": 16, "ep": 16},
            "ep=16 does not divide num_experts=8; allowed with dp=16, tp=1: 1, 2, 4, 8",
        ),
        (
            {"tp": 3, "ep": 3},
            "tp=3 does not divide n_heads=8, n_kv_heads=4, intermediate_size=256; allowed for this model: 1, 2, 4; "
            "ep=3 does not divide num_experts=8; allowed with dp=1, tp=3: 1",
        ),
    ],
)
def test_one_error_lists_every_size_that_does_not_divide(given_sizes: dict[str, int], message: str) -> None:
    config = family_for(QWEN3_MOE).model_config(QWEN3_MOE)
    with pytest.raises(BridgeError) as caught:
        check_divides(config, Sizes(**given_sizes))
    assert str(caught.value) == message


def test_expert_hidden_sizes_need_to_divide_only_without_expert_parallelism() -> None:
    hf = QWEN3_MOE | {"moe_intermediate_size": 65}
    config = family_for(hf).model_config(hf)
    check_divides(config, Sizes(tp=2, ep=2))
    with pytest.raises(BridgeError, match="tp=2 does not divide moe_intermediate_size=65"):
        check_divides(config, Sizes(tp=2))


def test_expert_parallelism_needs_experts() -> None:
    hf = QWEN3_MOE | {"architectures": ["Qwen3ForCausalLM"]}
    with pytest.raises(BridgeError, match="ep=2 but the model has no experts; allowed: 1"):
        check_divides(family_for(hf).model_config(hf), Sizes(tp=2, ep=2))


def test_the_vocabulary_is_padded_to_a_multiple_of_tp() -> None:
    assert [padded_vocab(777, Sizes(tp=tp)) for tp in (1, 2, 4)] == [777, 778, 780]
    assert padded_vocab(778, Sizes(tp=2)) == 778


def test_describing_meshes_does_not_import_torchtitan() -> None:
    code = "import sys, titan_bridge.mesh; sys.exit('torchtitan' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
