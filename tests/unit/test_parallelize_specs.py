"""The layouts that we compute are those that TorchTitan's own ``parallelize`` and ``fully_shard`` make."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchtitan.distributed.utils as titan_distributed
import transformers
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.models.common.decoder import Decoder

from titan_bridge.device_meshes import get_device_meshes, to_parallel_dims
from titan_bridge.engine.model.fsdp import shard_dense
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes, describe, mesh_axes
from titan_bridge.model_layout import ParamSpec, as_layout, specs, stated_dtype
from titan_bridge.models import families, family_for
from titan_bridge.models.adapters import use_plain_attention
from titan_bridge.models.build import build_on_meta, tie
from titan_bridge.parallelize import rules_of
from titan_bridge.sharding.spec import placement_to_str

_COMMON = {
    "vocab_size": 768,
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama3": _COMMON | {"architectures": ["LlamaForCausalLM"]},
    "qwen3-tied": _COMMON | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "qwen3-moe": _COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "mlp_only_layers": [1],
    },
    "deepseek": _COMMON
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 8,
        "q_lora_rank": 40,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
}
MODELS["gpt-oss"] = _COMMON | {
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
}
DENSE_SIZES = [
    Sizes(tp=2),
    Sizes(dp=2),
    Sizes(dp=2, tp=2),
    Sizes(dp=4, tp=2, dp_replicate=2),
    Sizes(dp=5, tp=1),
]
MOE_SIZES = [
    Sizes(dp=2, tp=2, ep=4),
    Sizes(dp=2, tp=2, ep=2),
    Sizes(dp=2, tp=2, ep=2, dp_replicate=2),
    Sizes(tp=2, ep=2),
    # More ranks than experts: FSDP shards their dim 1.
    Sizes(dp=16, ep=8),
    Sizes(dp=16, tp=2, ep=8),
    Sizes(dp=16, tp=2),
    Sizes(dp=8, dp_replicate=2),
]
CASES = [(model, sizes) for model in MODELS for sizes in DENSE_SIZES] + [
    (model, sizes) for model in MODELS if model not in ("llama3", "qwen3-tied") for sizes in MOE_SIZES
]


@contextmanager
def fake_world(sizes: Sizes, rank: int, spmd_backend: str) -> Iterator[None]:
    """A process group of ``sizes.world`` ranks in this process; its collectives do nothing."""
    before = titan_distributed.get_spmd_backend()
    dist.init_process_group("fake", rank=rank, world_size=sizes.world, store=FakeStore())
    titan_distributed._spmd_backend = spmd_backend
    try:
        yield
    finally:
        titan_distributed._spmd_backend = before
        dist.destroy_process_group()


def config_of(hf: dict[str, Any], sizes: Sizes) -> Decoder.Config:
    family = family_for(hf)
    config = family.model_config(hf, expert_bias=True)
    use_plain_attention(config)
    family.sharding.set_sharding(config, enable_ep=sizes.ep > 1)
    return config


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_sharded_specs_are_the_placements_of_fully_shard_on_top_of_parallelize(
    name: str, sizes: Sizes
) -> None:
    rank = sizes.world - 1
    config = config_of(MODELS[name], sizes)
    computed = specs(config, sizes, "shard")
    with fake_world(sizes, rank, "partial_dtensor"):
        model = build_on_meta(config, dtype=torch.float32)
        dims = to_parallel_dims(sizes, "partial_dtensor")
        model.parallelize(dims)
        # parallelize registers new parameters, which unties a head.
        tie(model)
        replicate = ["dp_replicate"] if sizes.dp_replicate > 1 else []
        apply_fsdp_to_decoder(
            model,
            dims.get_mesh([*replicate, "fsdp"]),
            param_dtype=torch.float32,
            reduce_dtype=torch.float32,
            pp_enabled=False,
            ep_degree=sizes.ep,
            edp_mesh=dims.get_optional_mesh([*replicate, "efsdp"]) if sizes.ep > 1 else None,
        )
        parameters = dict(model.named_parameters())
        assert parameters.keys() == {fqn for fqn, entry in computed.items() if not entry.is_buffer}
        for fqn, parameter in parameters.items():
            assert isinstance(parameter, DTensor)
            entry = computed[fqn]
            axes = dict(zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True))
            made = tuple(
                axes.get(axis, Replicate()) if sizes.axis(axis) > 1 else Replicate()
                for axis in mesh_axes(entry.spec.mesh)
            )
            assert entry.spec.placements == made, fqn
            assert entry.shape == tuple(parameter.shape), fqn
            mesh = describe(entry.spec.mesh, sizes, rank=rank)
            local = entry.spec.local_shape(entry.shape, mesh.shape, mesh.coordinate(rank))
            assert local == tuple(parameter.to_local().shape), fqn


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_replicated_specs_are_the_local_shapes_of_parallelize(name: str, sizes: Sizes) -> None:
    config = config_of(MODELS[name], sizes)
    computed = specs(config, sizes)
    for rank in {0, sizes.world - 1}:
        with fake_world(sizes, rank, "spmd_types"):
            model = build_on_meta(config, dtype=torch.float32)
            model.parallelize(to_parallel_dims(sizes, "spmd_types"))
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
            assert computed.keys() <= tensors.keys()
            for fqn, entry in computed.items():
                mesh = describe(entry.spec.mesh, sizes, rank=rank)
                local = entry.spec.local_shape(entry.shape, mesh.shape, mesh.coordinate(rank))
                assert local == tuple(tensors[fqn].shape), fqn


@pytest.mark.parametrize("spmd_backend", ["partial_dtensor", "spmd_types"])
@pytest.mark.parametrize("sizes", MOE_SIZES, ids=str)
def test_named_meshes_are_those_of_torchtitan(sizes: Sizes, spmd_backend: Any) -> None:
    rank = sizes.world // 2
    with fake_world(sizes, rank, spmd_backend):
        dims = to_parallel_dims(sizes, spmd_backend)
        dims.build_mesh()
        for name in ("dense", "sparse"):
            ours, theirs = describe(name, sizes, rank=rank), dims._global_meshes[name].mesh
            # TorchTitan's has pp in front, and cp of size 1 under spmd_types.
            assert torch.equal(theirs.reshape(ours.shape), torch.tensor(ours.ranks))
        for name in ("tp", "ep"):
            line = describe(name, sizes, rank=rank).flat_ranks()
            assert tuple(dims._single_axis_meshes[name].mesh.tolist()) == line


SERVED = [
    *(("qwen3-moe", sizes) for sizes in (Sizes(dp=2), Sizes(dp=2, tp=2, ep=2), Sizes(dp=4, tp=2, ep=4))),
    *(("qwen3-moe", sizes) for sizes in (Sizes(dp=2, tp=2, ep=4), Sizes(dp=16), Sizes(dp=16, tp=2))),
    *(("qwen3-moe", sizes) for sizes in (Sizes(dp=8, tp=2, ep=2), Sizes(dp=8, ep=4))),
    *((name, Sizes(dp=5)) for name in ("llama3", "qwen3-tied")),
]
"""With more dp ranks than the 8 experts at ep=1 and over efsdp, which FSDP then cuts along dim 1."""


@pytest.mark.parametrize(("name", "sizes"), SERVED, ids=str)
def test_sharded_serving_holds_what_the_layout_says(name: str, sizes: Sizes) -> None:
    """Element by element: what `shard_dense` leaves of numbered tensors on a few ranks, and the declared boxes."""
    config = config_of(MODELS[name], sizes)
    whole, sharded = specs(config, sizes), specs(config, sizes, "shard")
    full = {fqn: torch.arange(math.prod(e.shape)).view(e.shape).float() for fqn, e in whole.items()}

    def local(entry: ParamSpec, fqn: str, rank: int) -> torch.Tensor:
        mesh = describe(entry.spec.mesh, sizes, rank=rank)
        place = (entry.shape, mesh.shape, mesh.coordinate(rank))
        made = torch.empty(entry.spec.local_shape(*place))
        for piece in entry.spec.pieces(*place):
            made[piece.local.slices] = full[fqn][piece.box.slices]
        return made

    for rank in {0, 1, sizes.world // 2, sizes.world - 1}:
        with fake_world(sizes, rank, "partial_dtensor"):
            model = build_on_meta(config, dtype=torch.float32)
            for fqn, entry in whole.items():
                if not entry.is_buffer:
                    module, _, own = fqn.rpartition(".")
                    param = nn.Parameter(local(entry, fqn, rank), requires_grad=False)
                    model.get_submodule(module).register_parameter(own, param)
            tie(model)
            shard_dense(model, get_device_meshes(sizes, device_type="cpu"), as_layout(sharded, sizes))
            for fqn, param in model.named_parameters():
                held = param.to_local() if isinstance(param, DTensor) else param
                torch.testing.assert_close(held, local(sharded[fqn], fqn, rank), rtol=0, atol=0, msg=fqn)


def test_experts_that_do_not_divide_over_dp_are_refused() -> None:
    with pytest.raises(
        BridgeError, match=r"w1_EFD: FSDP cuts dim 1 evenly only, and fsdp=9 does not divide 64"
    ):
        specs(MODELS["qwen3-moe"], Sizes(dp=9), "shard")


def test_a_tied_head_is_the_embedding() -> None:
    computed = specs(MODELS["qwen3-tied"], Sizes(tp=2))
    assert "tok_embeddings.weight" in computed
    assert "lm_head.weight" not in computed


def test_a_vocabulary_that_tp_does_not_divide_is_padded() -> None:
    hf = MODELS["qwen3-moe"] | {"vocab_size": 777, "dtype": "bfloat16"}
    computed = specs(hf, Sizes(tp=2))
    assert computed["lm_head.weight"].shape == (778, 192)
    assert computed["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", MODELS)
def test_the_expert_biases_that_a_family_names_are_the_buffers_of_its_model(name: str) -> None:
    family, hf = family_for(MODELS[name]), MODELS[name]
    computed = specs(family.model_config(hf, expert_bias=True), Sizes())
    assert family.expert_biases(hf) == {fqn: spec.shape for fqn, spec in computed.items() if spec.is_buffer}


def test_the_expert_bias_is_replicated_in_float32_also_where_parameters_are_sharded() -> None:
    config = family_for(MODELS["qwen3-moe"]).model_config(MODELS["qwen3-moe"], expert_bias=True)
    bias = specs(config, Sizes(dp=2, tp=2, ep=4), "shard", dtype=torch.bfloat16)["layers.0.moe.expert_bias_E"]
    assert bias.is_buffer
    assert bias.spec.is_replicated
    assert bias.dtype == torch.float32


def test_the_config_given_is_left_without_shardings() -> None:
    config = family_for(MODELS["llama3"]).model_config(MODELS["llama3"])
    specs(config, Sizes(tp=2))
    assert config.tok_embeddings.sharding_config is None


def test_a_layout_of_61_layers_with_384_experts_takes_less_than_ten_seconds() -> None:
    hf = MODELS["qwen3-moe"] | {
        "num_hidden_layers": 61,
        "num_experts": 384,
        "num_experts_per_tok": 8,
        "hidden_size": 7168,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "moe_intermediate_size": 2048,
        "max_position_embeddings": 131072,
        "vocab_size": 163840,
    }
    start = time.process_time()
    computed = specs(hf, Sizes(dp=16, tp=8, ep=128), "shard")
    assert time.process_time() - start < 10
    experts = computed["layers.60.moe.routed_experts.inner_experts.w2_EDF"]
    assert experts.shape == (384, 7168, 2048)
    assert (experts.spec.mesh, [placement_to_str(p) for p in experts.spec.placements]) == (
        "sparse",
        ["R", "R", "S(0)"],
    )


V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}
K2 = V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": V3["rope_scaling"] | {"beta_fast": 1.0, "factor": 32.0},
}


@pytest.mark.parametrize(
    ("hf", "sizes"), [(V3, Sizes(dp=32, tp=8, ep=256)), (K2, Sizes(dp=32, tp=8, ep=128))], ids=["V3", "K2"]
)
def test_published_sizes_at_256_ranks_take_less_than_15_seconds(hf: dict[str, Any], sizes: Sizes) -> None:
    start = time.process_time()
    computed = specs(hf, sizes)
    assert time.process_time() - start < 15
    with torch.device("meta"):
        theirs = transformers.DeepseekV3ForCausalLM(
            transformers.DeepseekV3Config(**hf | {"model_type": "deepseek_v3"})
        )
    expected = sum(tensor.numel() for tensor in theirs.state_dict().values())
    assert sum(math.prod(param.shape) for param in computed.values()) == expected > 670e9


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(BridgeError, match="dense='split' is not a layout; allowed: replicate, shard"):
        specs(MODELS["llama3"], Sizes(), "split")  # type: ignore[arg-type]
    with pytest.raises(BridgeError, match=r"dtype='int8' in config\.json is not supported; allowed: float32"):
        stated_dtype({"torch_dtype": "int8"})
    with pytest.raises(BridgeError, match=r"family 'mamba' has no file parallelize/mamba\.py; add one"):
        rules_of("mamba")


def test_every_family_has_a_sharding_plan() -> None:
    for family in families():
        plan = family.sharding
        assert callable(plan.set_sharding)
        assert callable(plan.shard_placement_fn)


EIGHT_RANKS = [Sizes(dp=4, tp=2, ep=4), Sizes(dp=2, tp=4, ep=8), Sizes(dp=2, tp=2, ep=4, dp_replicate=2)]


@pytest.mark.parametrize("sizes", EIGHT_RANKS, ids=str)
def test_every_rank_makes_the_same_process_groups_in_the_same_order(sizes: Sizes) -> None:
    """torch numbers groups as they are made, whoever is in them: that number is how members find each other."""
    made: list[dict[str, list[int]]] = []
    counts = set()
    for rank in range(sizes.world):
        with fake_world(sizes, rank, "partial_dtensor"):
            to_parallel_dims(sizes, "partial_dtensor").build_mesh()
            get_device_meshes(sizes, device_type="cpu")
            world = distributed_c10d._world
            made.append({name: sorted(world.pg_group_ranks[group]) for group, name in world.pg_names.items()})
            counts.add(world.group_count)
    print(f"{sizes}: {len(made[0])} groups on a rank, {counts} in all")
    assert len(counts) == 1
    for rank, groups in enumerate(made):
        for name, members in groups.items():
            assert rank in members
            assert all(made[member].get(name) == members for member in members), (name, members)
        # Each costs a GPU memory and a connection: TorchTitan's 14 at the most, and ours once more for named meshes.
        assert len(groups) <= 24
