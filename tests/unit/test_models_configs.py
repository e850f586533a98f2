"""config.json -> TorchTitan config and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from torchtitan.distributed import parallel_dims
from torchtitan.models import gpt_oss
from torchtitan.models.common import ComplexRoPE, CosSinRoPE
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.deepseek_v3.model import DeepSeekV3Model
from torchtitan.models.gpt_oss.model import GptOssModel
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.models.qwen3.model import Qwen3Model

from tests.unit.config_samples import DEEPSEEK, GPT_OSS, LLAMA, LLAMA3_ROPE, MOE, QWEN3
from titan_bridge.device import use_cpu_if_no_accelerator
from titan_bridge.models import families, family_for, family_of
from titan_bridge.models.adapters import inner_attention


def test_every_supported_architecture_builds_torchtitans_own_model() -> None:
    expected = {
        "LlamaForCausalLM": Llama3Model,
        "Qwen3ForCausalLM": Qwen3Model,
        "Qwen3MoeForCausalLM": Qwen3Model,
        "DeepseekV3ForCausalLM": DeepSeekV3Model,
        "GptOssForCausalLM": GptOssModel,
    }
    assert {name for family in families() for name in family.architectures} == expected.keys()
    for hf in (LLAMA, QWEN3, MOE, DEEPSEEK, GPT_OSS):
        config = family_for(hf).model_config(hf)
        with torch.device("meta"):
            assert type(config.build()) is expected[hf["architectures"][0]]
        assert family_of(config) is family_for(hf)


def test_layers_share_nothing_that_a_caller_may_replace() -> None:
    config = family_for(LLAMA).model_config(LLAMA)
    inner = [layer.attention.inner_attention for layer in config.layers]
    assert all(type(item) is FlexAttention.Config for item in inner)
    assert len({id(item) for item in inner}) == len(inner)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_ROPE}},
        {
            "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE},
            "rope_parameters": None,
        },
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3_ROPE}, "rope_parameters": None},
    ],
)
def test_both_spellings_of_rope_settings_are_read(spelling: dict[str, Any]) -> None:
    hf = LLAMA | spelling
    rope = family_for(hf).model_config(hf).layers[0].attention.rope
    assert type(rope) is ComplexRoPE.Config
    assert (rope.dim, rope.max_seq_len, rope.theta, rope.scaling) == (48, 512, 500000.0, "llama")
    assert (rope.scaling_factor, rope.low_freq_factor, rope.high_freq_factor) == (8.0, 1.0, 4.0)
    assert rope.original_max_position_embeddings == 128


def test_plain_rope_is_read_from_both_spellings() -> None:
    for spelling in (
        {"rope_theta": 1e6},
        {"rope_parameters": {"rope_theta": 1e6}},
        {"rope_theta": 1e6, "rope_scaling": None},
    ):
        rope = family_for(QWEN3).model_config(QWEN3 | spelling).layers[0].attention.rope
        assert type(rope) is CosSinRoPE.Config
        assert (rope.theta, rope.scaling) == (1e6, "none")


def test_sparse_layers_are_those_that_the_config_says() -> None:
    config = family_for(MOE).model_config(MOE)
    assert [layer.moe is not None for layer in config.layers] == [False, True, False, False]
    moe = config.layers[1].moe
    assert (moe.num_experts, moe.router.top_k, moe.router.route_norm, moe.router.score_func) == (
        8,
        3,
        True,
        "softmax",
    )
    assert moe.routed_experts.inner_experts.hidden_dim == 64
    assert moe.load_balance_coeff is None
    assert family_for(MOE).model_config(MOE, expert_bias=True).layers[1].moe.load_balance_coeff is not None
    assert (
        family_for(MOE).model_config(MOE | {"norm_topk_prob": False}).layers[1].moe.router.route_norm is False
    )


def test_defaults_are_those_of_transformers() -> None:
    left_out = ("num_key_value_heads", "head_dim")
    for hf, config_class in (
        (LLAMA, transformers.LlamaConfig),
        (QWEN3, transformers.Qwen3Config),
        (MOE, transformers.Qwen3MoeConfig),
    ):
        short = {name: value for name, value in hf.items() if name not in left_out} | {
            "num_attention_heads": 32,
            "hidden_size": 256,
        }
        attention = family_for(short).model_config(short).layers[0].attention
        theirs = config_class(**short)
        assert attention.n_kv_heads == theirs.num_key_value_heads
        # Qwen3MoeConfig has no head_dim of its own; its model divides.
        assert attention.rope.dim == (getattr(theirs, "head_dim", None) or 256 // 32)
        assert family_for(short).model_config(short).norm.eps == theirs.rms_norm_eps


@pytest.mark.parametrize(
    "hf",
    [
        LLAMA,
        QWEN3,
        QWEN3 | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
        MOE,
        MOE
        | {"mlp_only_layers": [], "decoder_sparse_step": 1, "use_sliding_window": True, "sliding_window": 16},
        DEEPSEEK,
        DEEPSEEK
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": {"rope_theta": 5e4}},
        GPT_OSS,
        GPT_OSS | {"layer_types": None, "rope_parameters": None, "num_key_value_heads": 8},
    ],
)
def test_a_config_written_back_means_the_same_to_us_and_to_transformers(hf: dict[str, Any]) -> None:
    family = family_for(hf)
    written = family.hf_config(family.model_config(hf), dtype="float32")
    assert json.loads(json.dumps(written)) == written
    assert family.views(written) == family.views(hf)
    assert windows(written) == windows(hf)
    config, again = family.model_config(hf), family.model_config(written)
    assert again.layers[0].attention.rope == config.layers[0].attention.rope
    assert again.enable_weight_tying == config.enable_weight_tying
    config_class = transformers.CONFIG_MAPPING[written["model_type"]]
    theirs, original = config_class(**written), config_class(**hf)
    for name in hf.keys() | {"head_dim", "num_key_value_heads", "rope_parameters", "rms_norm_eps"}:
        if name not in NOT_WRITTEN:
            assert getattr(theirs, name) == getattr(original, name), name


NOT_WRITTEN = ("max_window_layers", "decoder_sparse_step", "mlp_only_layers", "intermediate_size")
"""Other spellings of what `layer_types` and `mlp_only_layers` say, and a size that a model may have no layer of."""


def windows(hf: dict[str, Any]) -> list[int | None]:
    return [inner_attention(layer.attention).window for layer in family_for(hf).model_config(hf).layers]


def test_sliding_windows_are_those_of_transformers() -> None:
    for extra in (
        {},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0},
    ):
        hf = QWEN3 | extra
        theirs = transformers.Qwen3Config(**hf)
        expected = [
            theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types
        ]
        assert windows(hf) == expected
    hf = MOE | {"use_sliding_window": True, "sliding_window": 16}
    assert windows(hf) == [16] * 4
    assert windows(LLAMA) == [None] * 4


def test_torchtitan_uses_the_accelerator_or_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = torch.accelerator.current_accelerator()
    monkeypatch.setattr(parallel_dims, "device_type", "cuda")
    expected = accelerator.type if accelerator is not None else "cpu"
    assert use_cpu_if_no_accelerator() == expected
    assert parallel_dims.device_type == expected
    assert use_cpu_if_no_accelerator() == expected


@pytest.mark.parametrize("hf", [LLAMA, QWEN3, MOE, DEEPSEEK, GPT_OSS])
def test_what_an_adapter_says_of_attention_is_what_torchtitan_computes(hf: dict[str, Any]) -> None:
    config = family_for(hf).model_config(hf)
    with torch.device("meta"):
        model = config.build()
    given: dict[str, Any] = {}
    attention = model.layers["1"].attention

    def record(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> torch.Tensor:
        given.update(keywords, q=q.shape, k=k.shape, v=v.shape)
        return v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)

    attention.inner_attention.forward = record
    attention(torch.empty(1, 5, 192, device="meta"), None)
    inner = inner_attention(config.layers[1].attention)
    assert given["q"] == (1, 5, inner.n_heads, inner.qk_head_dim)
    assert given["k"] == (1, 5, inner.n_kv_heads, inner.qk_head_dim)
    assert given["v"] == (1, 5, inner.n_kv_heads, inner.v_head_dim)
    assert (given["scale"] or inner.qk_head_dim**-0.5) == pytest.approx(inner.scale, rel=1e-12)
    assert inner.sinks == (given.get("out_transform") is not None)


@pytest.mark.parametrize(("flavor", "parameters"), [("20b", 20_914_757_184), ("120b", 116_829_156_672)])
def test_gpt_oss_of_torchtitan_is_written_and_read_again(flavor: str, parameters: int) -> None:
    config = gpt_oss.model_registry(flavor).model
    hf = family_of(config).hf_config(config)
    again = family_for(hf).model_config(hf, expert_bias=True)
    for ours, theirs in zip(again.layers, config.layers, strict=True):
        assert ours.attention.rope == theirs.attention.rope
        assert inner_attention(ours.attention) == inner_attention(theirs.attention)
    with torch.device("meta"):
        ours, theirs = again.build().state_dict(), config.build().state_dict()
        published = transformers.GptOssForCausalLM(transformers.GptOssConfig(**hf)).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert {view.name: torch.Size(view.shape) for view in family_for(hf).views(hf)} == {
        name: tensor.shape for name, tensor in published.items()
    }
    assert sum(tensor.numel() for tensor in published.values()) == parameters
