"""Specs on vLLM's own models: what they cut from the checkpoint is what vLLM's own loader put into each rank.

Most cases load models on two ranks without an engine around them, which also reaches vLLM's experts under expert
parallelism, whose kernel the CPU backend cannot run.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import Replicate, Shard

from titan_bridge.config.reader import from_dict
from titan_bridge.config.schema import InferConfig
from titan_bridge.engine.native_specs import Native, Part, cut
from titan_bridge.sharding import Layout, ShardingSpec
from titan_bridge.testing import make_checkpoint

pytestmark = pytest.mark.engine
ASK = {"titan": {"attach_specs": True}}
CASES = {
    "moe": ("qwen3_moe", {"vocab_size": 777}, False),
    "moe_ep": ("qwen3_moe", {"num_experts": 6}, True),
    "moe_uneven": ("qwen3_moe", {"num_experts": 7}, True),
    "llama": ("llama3", {"attention_bias": True}, False),
    "qwen3": ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 777}, False),
}
"""Name -> family, fields of its config, expert parallel. Mixtures first: with them vLLM makes the ep group."""


def rank_main(rank: int, port: int, folder: str) -> None:
    """Load each case on this rank and write down what `titan_bridge.engine.live` says of it."""
    os.environ["VLLM_DIST_IDENT"] = f"titan-{port}"  # the CPU worker names its shared memory by it
    torch.set_num_threads(1)
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    from titan_bridge.engine import live
    from titan_bridge.sharding import get

    _set_torch_accelerator_to_noop()  # what the CPU worker does before it loads
    load_general_plugins()
    for name, (_, _, ep) in CASES.items():
        config = EngineArgs(
            model=f"{folder}/{name}",
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            tensor_parallel_size=2,
            enable_expert_parallel=ep,
            additional_config=ASK,
        ).create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(2, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
            ensure_model_parallel_initialized(2, 1)
            try:
                model = get_model(vllm_config=config)
            except ValueError as error:
                answer = {"error": str(error)}
            else:
                worker = SimpleNamespace(get_model=lambda model=model: model, vllm_config=config)
                answer = {
                    "layout": live.titan_sharding_spec(worker),
                    "native": live.titan_native_specs(worker),
                    "verified": live.titan_verify_specs(worker, f"{folder}/{name}"),
                    "carried": [fqn for fqn, param in model.named_parameters() if get(param) is not None],
                }
        Path(folder, f"{name}.{rank}.json").write_text(json.dumps(answer))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Case -> what each of the two ranks said."""
    folder = tmp_path_factory.mktemp("native")
    for name, (family, fields, _) in CASES.items():
        make_checkpoint(folder / name, family, num_hidden_layers=1, tokenizer=False, **fields)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, args=(port, str(folder)), nprocs=2)
    return {
        name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)]
        for name in CASES
    }


@pytest.mark.parametrize("case", ["llama", "qwen3", "moe", "moe_ep"])
def test_every_parameter_is_what_its_spec_cuts_from_the_checkpoint(answers, case):
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
    qkv = told("qwen3", "qkv_proj.weight")
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


def test_in_a_running_engine(tmp_path):
    """Post-processed, compiled kernels chosen, ready to serve: still what the specs say."""
    from titan_bridge.engine import specs
    from titan_bridge.engine.offline import engine

    model = str(make_checkpoint(tmp_path / "moe", "qwen3_moe"))
    config = {
        "model": model,
        "model_impl": "vllm",
        "dtype": "float32",
        "max_model_len": 64,
        "parallel": {"tp": 2},
        "vllm": {"enforce_eager": True, "max_num_seqs": 2, "additional_config": ASK},
    }
    with engine(from_dict(InferConfig, config)) as (llm, workers, _):
        assert workers[0]["model_class"] == "vllm.model_executor.models.qwen3_moe.Qwen3MoeForCausalLM"
        verified, layout = specs.verify(llm, model), specs.layout(llm)
    assert [found for worker in verified for found in worker if not found["equal"]] == []
    assert len(verified) == 2
    assert layout.local_shape("model.layers.1.mlp.experts.routed_experts.w2_weight", 1) == (8, 128, 32)
