"""Specs against the checkpoint: what vLLM's loader and ours put into each rank is what the specs say.

Models are loaded on two and four ranks without an engine around them: many layouts for one start. That also
reaches vLLM's own experts under expert parallelism, whose kernel the CPU backend cannot run.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titan_bridge import cli
from titan_bridge.engine.native.layers import Native, Part
from titan_bridge.engine.native.specs import cut
from titan_bridge.mesh import Sizes
from titan_bridge.model_layout import layout
from titan_bridge.models import load_hf_config
from titan_bridge.policy.read import policy_from
from titan_bridge.ports import free_port
from titan_bridge.sharding import Layout, ShardingSpec
from titan_bridge.testing import make_checkpoint, titan_tensors

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ASK = {"additional_config": {"titan": {"attach_specs": True}}}
OURS = {"model_impl": "torchtitan"}
SHARD = OURS | {"additional_config": {"titan": {"dense": "shard"}}}
SHARD_EP2 = OURS | {"additional_config": {"titan": {"dense": "shard", "ep": 2}}}
RULES = {
    "axes": {"attn_tp": 1},
    "rules": [
        {"match": {"kind": "attention"}, "plan": {"tp_size": "attn_tp"}},
        {"match": {"kind": "lm_head"}, "plan": {"tp_size": 1}},
    ],
}
NARROW = OURS | {"additional_config": {"titan": {"parallelism": RULES}}}
NARROW_SHARD = OURS | {"additional_config": {"titan": {"parallelism": RULES, "dense": "shard"}}}
EP = {"enable_expert_parallel": True}
SLICE_BYTES = 64 << 10
"""Of `verify`, in these tests: an expert's matrix, and several slices for an embedding."""
TP, DP = {"tensor_parallel_size": 2}, {"data_parallel_size": 2}
MODELS = {
    "moe": ("qwen3_moe", {"vocab_size": 777}),
    "moe7": ("qwen3_moe", {"num_experts": 7}),
    "llama": ("llama3", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama_bias": ("llama3", {"attention_bias": True}),
    "qwen3": ("qwen3", {"vocab_size": 777, "tie_word_embeddings": True}),
    "qwen3_mqa": ("qwen3", {"num_key_value_heads": 1}),
}
"""Name -> family and fields of its config."""
NATIVE = {
    "moe": ("moe", ASK | TP),
    "moe_ep": ("moe", ASK | TP | EP),
    "moe_uneven": ("moe7", ASK | TP | EP),
    "llama": ("llama_bias", ASK | TP),
    "qwen3": ("qwen3", ASK | TP),
    "qwen3_mqa": ("qwen3_mqa", ASK | TP),
}
TITAN = {
    "titan_moe": ("moe", OURS | TP, Sizes(tp=2)),
    "titan_moe_ep": ("moe", OURS | TP | EP, Sizes(tp=2, ep=2)),
    "titan_llama": ("llama", OURS | TP, Sizes(tp=2)),
    "titan_qwen3": ("qwen3", OURS | TP, Sizes(tp=2)),
    "titan_moe_dp_ep": ("moe", OURS | DP | EP, Sizes(dp=2, ep=2)),
    "titan_moe_dp_shard": ("moe", SHARD | DP, Sizes(dp=2)),
    "titan_moe_dp_ep_shard": ("moe", SHARD | DP | EP, Sizes(dp=2, ep=2)),
    "titan_qwen3_dp_shard": ("qwen3", SHARD | DP, Sizes(dp=2)),
    "titan_llama_dp_tp_shard": ("llama", SHARD | DP | TP, Sizes(dp=2, tp=2)),
    "titan_moe_dp_tp_ep": ("moe", OURS | DP | TP | EP, Sizes(dp=2, tp=2, ep=4)),
    "titan_moe_dp_tp_ep_shard": ("moe", SHARD | DP | TP | EP, Sizes(dp=2, tp=2, ep=4)),
    "titan_moe_dp_tp_shard": ("moe", SHARD | DP | TP, Sizes(dp=2, tp=2)),
    "titan_moe_dp_tp_ep2_shard": ("moe", SHARD_EP2 | DP | TP | EP, Sizes(dp=2, tp=2, ep=2)),
    "titan_moe_dp_tp_ep_narrow": ("moe", NARROW | DP | TP | EP, Sizes(dp=2, tp=2, ep=4)),
    "titan_moe_dp_tp_ep_narrow_shard": ("moe", NARROW_SHARD | DP | TP | EP, Sizes(dp=2, tp=2, ep=4)),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = NATIVE | {name: case[:2] for name, case in TITAN.items()}
"""Name -> model and vLLM's engine options. Mixtures first: with them vLLM makes the ep group."""


def world_of(name: str) -> int:
    options = CASES[name][1]
    return options.get("tensor_parallel_size", 1) * options.get("data_parallel_size", 1)


def rank_main(rank: int, world: int, port: int, folder: str) -> None:
    """Load each case of this `world` on this rank and write down what `titan_bridge.engine.live` says of it."""
    os.environ["VLLM_DIST_IDENT"] = f"titan-{port}"  # the CPU worker names its shared memory by it
    torch.set_num_threads(1)
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    from titan_bridge.engine import live, verify
    from titan_bridge.sharding import get

    verify.SLICE_BYTES = SLICE_BYTES
    _set_torch_accelerator_to_noop()  # what the CPU worker does before it loads
    load_general_plugins()
    init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
    tp = 2
    for name, (model, options) in CASES.items():
        if world_of(name) != world:
            continue
        config = EngineArgs(
            model=f"{folder}/{model}", dtype="float32", enforce_eager=True, max_model_len=64, **options
        ).create_engine_config()
        with set_current_vllm_config(config):
            if tp != options.get("tensor_parallel_size", 1):
                destroy_model_parallel()
                tp = 1
            ensure_model_parallel_initialized(tp, 1)
            try:
                loaded = get_model(vllm_config=config)
            except ValueError as error:
                answer = {"error": str(error)}
            else:
                worker = SimpleNamespace(get_model=lambda loaded=loaded: loaded, vllm_config=config)
                groups = len(dist.distributed_c10d._world.pg_map)
                before = bytes_read()
                with NewMemory() as new:
                    verified = live.titan_verify_specs(worker, f"{folder}/{model}")
                read = bytes_read() - before
                if name in TITAN:
                    verified += live.titan_verify_specs(worker, f"{folder}/{model}-dcp")
                answer = {
                    "layout": live.titan_sharding_spec(worker),
                    "native": live.titan_native_specs(worker) if name in NATIVE else {},
                    "verified": verified,
                    "largest": new.largest,
                    "read": read,
                    "groups": len(dist.distributed_c10d._world.pg_map) - groups,
                    "gathered": {} if name in NATIVE else differing(loaded, f"{folder}/{model}"),
                    "carried": [fqn for fqn, param in loaded.named_parameters() if get(param) is not None],
                }
        Path(folder, f"{name}.{rank}.json").write_text(json.dumps(answer))


def bytes_read() -> int:
    """By this process, from anything."""
    return int(Path("/proc/self/io").read_text().split()[1])


class NewMemory(TorchDispatchMode):
    """The most bytes that one operator allocates while it is entered; collectives are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "c10d" not in func.name(), func.name()
        given = {each.data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        new = not func.is_view and "set_" not in func.name()  # which lays a tensor over a mapped file
        if new and isinstance(result, torch.Tensor) and result.data_ptr() not in given:
            self.largest = max(self.largest, result.nbytes)
        return result


def differing(loaded: Any, folder: str) -> dict[str, int]:
    """How many parameters there are, and how many, gathered by their specs, are not the checkpoint's."""
    from titan_bridge.device_meshes import get_device_meshes
    from titan_bridge.sharding.spec import attached

    meshes = get_device_meshes(loaded.setup.sizes, device_type="cpu")
    live = dict(loaded.model.named_parameters(remove_duplicate=False))
    found = {"parameters": 0, "different": 0}
    for fqn, whole in titan_tensors(folder).items():
        module, _, name = fqn.rpartition(".")
        spec = attached(loaded.model.get_submodule(module), name)
        local = live[fqn].to_local() if isinstance(live[fqn], DTensor) else live[fqn]
        shape = torch.Size(loaded.layout.params[fqn].shape)
        gathered = DTensor.from_local(
            local,
            meshes[spec.mesh],
            spec.placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape).stride(),
        ).full_tensor()
        padding = gathered[len(whole) :]
        found["parameters"] += 1
        found["different"] += not torch.equal(gathered[: len(whole)], whole) or bool(padding.any())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loaded")
    for name, (family, fields) in MODELS.items():
        source = make_checkpoint(folder / name, family, num_hidden_layers=1, tokenizer=False, **fields)
        if name in {model for model, *_ in TITAN.values()}:
            assert cli.main(["reshard", str(source), str(folder / f"{name}-dcp"), "--to", "dcp"]) == 0
    return folder


@pytest.fixture(scope="module")
def answers(folder):
    """Case -> what each rank said."""
    for world in (2, 4):
        port = free_port()
        mp.spawn(rank_main, args=(world, port, str(folder)), nprocs=world)
    return {
        name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(world_of(name))]
        for name in CASES
    }


@pytest.mark.parametrize("case", TITAN)
def test_a_served_torchtitan_parameter_gathered_by_its_spec_is_the_checkpoints(answers, folder, case):
    """`DTensor.from_local(p, mesh, placements).full_tensor()`, bit for bit; `verify` finds each of its slices, and
    inspect says the same layout."""
    model, options, sizes = TITAN[case]
    asked = options.get("additional_config", {}).get("titan", {})
    policy = policy_from(asked.get("parallelism", {}), "the case")
    expected = layout(load_hf_config(folder / model), sizes, asked.get("dense", "replicate"), policy=policy)
    for answer in answers[case]:
        assert "error" not in answer, answer["error"]
        assert [found for found in answer["verified"] if not found["equal"]] == []
        assert [found["name"] for found in answer["verified"]] == 2 * list(expected.params)  # and of a DCP
        assert answer["gathered"] == {"parameters": len(expected.params), "different": 0}
        assert Layout.from_json(answer["layout"]) == expected
        assert answer["layout"] == expected.to_json()
        sharded = [fqn for fqn, param in expected.params.items() if not param.spec.is_replicated]
        assert answer["carried"] == [f"model.{fqn}" for fqn in sharded]


@pytest.mark.parametrize("case", TITAN)
def test_verifying_takes_a_slice_at_a_time_and_no_other_rank(answers, folder, case):
    embedding = answers[case][0]["layout"]["params"]["tok_embeddings.weight"]["shape"]
    assert 4 * math.prod(embedding) > 4 * SLICE_BYTES
    for answer in answers[case]:
        assert 0 < answer["largest"] <= SLICE_BYTES
        weights = folder / TITAN[case][0] / "model.safetensors"
        assert answer["read"] < 1.1 * weights.stat().st_size + (256 << 10)  # each weight once, and headers
        assert answer["groups"] == 0


def test_padding_of_the_vocabulary_is_stated(answers):
    notes = {found["name"]: found["note"] for found in answers["titan_moe"][0]["verified"]}
    assert notes.pop("tok_embeddings.weight") == notes.pop("lm_head.weight") == "1 rows of padding, zero"
    assert set(notes.values()) == {""}


@pytest.mark.parametrize("case", [name for name in NATIVE if name != "moe_uneven"])
def test_every_parameter_of_vllms_own_is_what_its_spec_cuts_from_the_checkpoint(answers, case):
    for answer in answers[case]:
        assert "error" not in answer, answer["error"]
        assert [found for found in answer["verified"] if not found["equal"]] == []
        assert {found["name"] for found in answer["verified"]} == set(answer["native"])
        for told in answer["native"].values():
            if told["placements"] is None:  # replicated: the whole tensor is here
                assert told["local_shape"] == told["live_shape"] == told["shape"]
        sharded = {fqn for fqn, told in answer["native"].items() if told["placements"] is not None}
        assert set(answer["carried"]) == sharded
    first, second = (answer["layout"] for answer in answers[case])
    assert first == second
    assert set(Layout.from_json(first).params) == set(answers[case][0]["native"])


def test_what_is_sharded_and_how(answers):
    def told(case: str, name: str) -> dict:
        (found,) = [value for fqn, value in answers[case][0]["native"].items() if fqn.endswith(name)]
        return found

    row, column = ["R", "R", "S(1)"], ["R", "R", "S(0)"]
    assert told("llama", "o_proj.weight")["placements"] == row
    assert told("llama", "o_proj.bias")["placements"] is None
    assert told("llama", "qkv_proj.bias")["placements"] == column
    gate_up = told("llama", "gate_up_proj.weight")
    assert gate_up["placements"] == column
    assert [(part["name"], part["size"]) for part in gate_up["parts"]] == [
        ("gate_proj", 256),
        ("up_proj", 256),
    ]
    # One kv head on two ranks: both hold it, and the global tensor counts it twice.
    qkv = told("qwen3_mqa", "qkv_proj.weight")
    assert [part["replicas"] for part in qkv["parts"]] == [1, 2, 2]
    assert [part["size"] for part in qkv["parts"]] == [256, 32, 32]
    assert qkv["shape"][0] == 256 + 2 * 32 + 2 * 32
    assert told("qwen3", "embed_tokens.weight")["padding"] == 832 - 777
    assert "lm_head.weight" not in answers["qwen3"][0]["native"]  # tied
    assert told("moe", "lm_head.weight")["padding"] == 832 - 777
    # Experts over tp are cut inside each, over ep by the expert.
    assert told("moe", "w13_weight")["placements"] == row
    assert told("moe", "w2_weight")["placements"] == ["R", "R", "S(2)"]
    w13 = told("moe_ep", "w13_weight")
    assert (w13["mesh"], w13["placements"], w13["dim"]) == ("sparse", column, 1)
    assert [part["name"] for part in w13["parts"]] == ["gate_proj", "up_proj"]
    # The CPU kernel wants experts in an order of its own, and says so; linears stay as they were loaded.
    assert {told("moe", "w13_weight")["stored"], told("moe", "w2_weight")["stored"]} == {"repacked"}
    assert told("moe", "qkv_proj.weight")["stored"] == "as loaded"


def test_a_sharding_that_placements_cannot_say_is_refused(answers):
    for answer in answers["moe_uneven"]:
        assert "mlp.experts.routed_experts (RoutedExperts): 7 physical (7 logical) experts" in answer["error"]


def test_replicated_kv_heads_between_whole_and_one():
    """Two kv heads on four ranks: ranks 0 and 1 hold the first, 2 and 3 the second."""
    q, k = torch.arange(8.0).reshape(8, 1), torch.arange(100.0, 104.0).reshape(4, 1)
    spec = ShardingSpec(mesh="dense", placements=(Replicate(), Replicate(), Shard(0)))
    parts = (Part(name="q", size=8), Part(name="k", size=4, replicas=2))
    native = Native(spec=spec, shape=(16, 1), parts=parts)
    held = [cut(native, [q, k], (1, 1, 4), (0, 0, rank)).flatten().tolist() for rank in range(4)]
    assert held == [
        [0, 1, 100, 101],
        [2, 3, 100, 101],
        [4, 5, 102, 103],
        [6, 7, 102, 103],
    ]
