"""Dense updates between real processes: trainer ranks with DTensors on gloo meshes, workers with live local tensors.

The families other than Qwen3-MoE get a delta, too.
"""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed import transfer_parties as parties
from titan_bridge.mesh import Sizes
from titan_bridge.sharding.layout import Layout
from titan_bridge.testing_processes import PlainClient, retarget
from titan_bridge.testing_samples import differences, sample, sample_dtensors, sample_target
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.trainer import Trainer
from titan_bridge.transfer.worker import Worker

pytestmark = pytest.mark.distributed

BUCKET = 64 * 1024
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 768,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
COMMON = {
    name: MOE[name]
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    )
}  # fmt: skip
FAMILIES = {
    "deepseek_v3": COMMON
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "intermediate_size": 256,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 64,
    },
    "gpt_oss": COMMON
    | {
        "architectures": ["GptOssForCausalLM"],
        "intermediate_size": 64,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}


def three_updates(rank: int, world: int, layout: dict, client: PlainClient) -> None:
    told = Layout.from_json(layout)
    held = sample_dtensors(told, rank, 1)
    trainer = Trainer(lambda: held, client, options=Options(seconds=30, bucket_bytes=BUCKET))
    trainer.connect()
    for version in (1, 2, 3):
        held |= sample_dtensors(told, rank, version)
        report = trainer.send()
        assert (report.version, report.kind) == (str(version), "whole")
        assert report.before == {"engine0": "default" if version == 1 else str(version - 1)}
        assert trainer._sender.buffer_bytes <= 2 * BUCKET
        # On every rank: what each trainer rank sent to each worker is what each worker received.
        for worker, received in report.received.items():
            assert received == sum(sent.get(worker, 0) for sent in report.sent)
        assert len(report.sent) == world
        assert sum(report.received.values()) == report.lower_bound > 0
        if rank == 0:
            # Not a byte more than the planner's lower bound was counted.
            assert client.call(differences, version) == [[]] * len(client.addresses)
            # Beside the weights at most one message of each rank.
            assert all(live <= staging <= live + world * BUCKET for staging, live in client.call(memory))
    trainer.close()


def memory(worker: Worker) -> tuple[int, int]:
    live = sum(tensor.nbytes for tensor in worker.target.tensors().values())
    return worker._link.staging.nbytes, live


class Named(torch.nn.Module):
    """The tensors that `workers` serve, in a model whose forward reads one of them."""

    def __init__(self) -> None:
        super().__init__()
        for name, param in Layout.from_json(parties.layout(1, 0)).params.items():
            self.register_parameter(name, torch.nn.Parameter(sample(name, param.shape, parties.NEW)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.norm


def after_a_forward(rank: int, world: int, client: PlainClient) -> int:
    model = fully_shard(Named(), mesh=init_device_mesh("cpu", (world,)))
    with Trainer(model, client, options=Options(seconds=parties.LIMIT)) as trainer:
        trainer.connect()
        with torch.no_grad():
            model(torch.ones(48))
        assert not isinstance(model.norm, DTensor)  # FSDP2 leaves its root as it is, for a backward
        trainer.send()
        assert torch.equal(model(torch.ones(48)), sample("norm", (48,), parties.NEW))
        return trainer.verify()


def test_a_model_that_has_computed_without_gradients_is_sent(trainers, workers):
    assert trainers.run(after_a_forward, workers) == [14, 14]
    assert parties.have(workers, parties.NEW)


LAYOUTS = [
    ("fsdp 2 -> tp 2", Sizes(dp=2), "shard", Sizes(tp=2), "replicate"),
    ("fsdp 2 x tp 2 -> dp 2, ep", Sizes(dp=2, tp=2), "shard", Sizes(dp=2, ep=2), "replicate"),
    ("ep 2 -> tp 2, ep 2", Sizes(dp=2, ep=2), "shard", Sizes(tp=2, ep=2), "replicate"),
    ("1 -> tp 2", Sizes(), "replicate", Sizes(tp=2), "replicate"),
    ("fsdp 2 -> dp 2 sharded", Sizes(dp=2), "shard", Sizes(dp=2), "shard"),
    ("fsdp 2 x tp 2 -> dp 2 sharded, ep", Sizes(dp=2, tp=2), "shard", Sizes(dp=2, ep=2), "shard"),
    (
        "hsdp 2 x 2 -> tp 2, fp32 on both sides",
        Sizes(dp_replicate=2, dp=2),
        "shard",
        Sizes(tp=2),
        "replicate",
    ),
]


@pytest.mark.parametrize(("source", "dense", "target", "target_dense"), [row[1:] for row in LAYOUTS],
                         ids=[row[0] for row in LAYOUTS])  # fmt: skip
def test_every_worker_gets_its_slices_and_nothing_else(ranks, pair, source, dense, target, target_dense):
    from titan_bridge.model_layout import layout  # here: the processes that are started need no torchtitan

    wire = torch.float32 if source.dp_replicate > 1 else torch.bfloat16
    told = layout(MOE, source, dense, dtype=torch.float32)
    served = layout(MOE, target, target_dense, dtype=wire).to_json()
    pair.call(retarget, sample_target, [(served, rank, rank, 0) for rank in range(2)])
    ranks.run(three_updates, told.to_json(), pair, world=source.world)


def whole_then_delta(rank: int, world: int, layout: dict, client: PlainClient) -> None:
    told = Layout.from_json(layout)
    held = sample_dtensors(told, rank, 1)
    trainer = Trainer(lambda: held, client, options=Options(seconds=30, bucket_bytes=BUCKET))
    trainer.connect()
    trainer.send()
    if rank == 0:
        assert client.call(differences, 1) == [[]] * len(client.addresses)
    for tensor in held.values():
        local = tensor.to_local().view(-1)
        local[:: max(1, len(local) // 50)] *= -1
    report = trainer.send()
    assert report.kind == "delta"
    assert sum(report.received.values()) < report.lower_bound / 4
    compared = trainer.verify()
    assert compared >= len(told.params)
    held |= sample_dtensors(told, rank, 2)
    assert trainer.send().kind == "whole"
    if rank == 0:
        assert client.call(differences, 2) == [[]] * len(client.addresses)
    trainer.close()


@pytest.mark.parametrize(
    ("family", "source", "target"),
    [
        ("deepseek_v3", Sizes(dp=2, tp=2), Sizes(tp=2, ep=2)),
        ("deepseek_v3", Sizes(dp=2, ep=2), Sizes(tp=2)),
        ("gpt_oss", Sizes(dp=2, tp=2), Sizes(dp=2, ep=2)),
        ("gpt_oss", Sizes(dp=2, ep=2), Sizes(tp=2)),
    ],
    ids=str,
)
def test_latents_and_sinks_biases_and_experts_arrive(ranks, pair, family, source, target):
    from titan_bridge.model_layout import layout  # here: the processes that are started need no torchtitan

    told = layout(FAMILIES[family], source, "shard", dtype=torch.float32)
    served = layout(FAMILIES[family], target, dtype=torch.bfloat16)
    names = {name.rsplit(".", 1)[1] for name in served.params}
    assert names >= ({"expert_bias_E"} if family == "deepseek_v3" else {"sinks", "mlp1_bias_EG"}), names
    pair.call(retarget, sample_target, [(served.to_json(), rank, rank, 0) for rank in range(2)])
    ranks.run(whole_then_delta, told.to_json(), pair, world=source.world)
