"""config.json -> TorchTitan config and back, and what is refused by name."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torchtitan.distributed import parallel_dims
from torchtitan.models import deepseek_v3, gpt_oss
from torchtitan.models.common import ComplexRoPE, CosSinRoPE
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.deepseek_v3.model import DeepSeekV3Model
from torchtitan.models.gpt_oss.model import GptOssModel
from torchtitan.models.kimi_k2_7 import kimi_k2_5_configs
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.models.qwen3.model import Qwen3Model

from titan_bridge.checkpoint.hf import read_config
from titan_bridge.checks import model_directory
from titan_bridge.device import use_cpu_if_no_accelerator
from titan_bridge.errors import BridgeError
from titan_bridge.models import UnsupportedModelError, families, family_for, family_of, load_hf_config
from titan_bridge.models.adapters import inner_attention

COMMON = {
    "vocab_size": 777,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_ROPE},
}
QWEN3 = COMMON | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
MOE = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
    "norm_topk_prob": True,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "original_max_position_embeddings": 128,
}
DEEPSEEK = {name: value for name, value in COMMON.items() if name != "head_dim"} | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 8,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "routed_scaling_factor": 1.5,
    "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
}
GPT_OSS = COMMON | {
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "swiglu_limit": 5.0,
    "rope_parameters": YARN | {"truncate": False},
}


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


@pytest.mark.parametrize(
    ("hf", "change", "message"),
    [
        (
            LLAMA,
            {"attention_bias": True},
            "LlamaForCausalLM: attention_bias=true in config.json is not supported; allowed: false",
        ),
        (
            LLAMA,
            {"mlp_bias": True},
            "LlamaForCausalLM: mlp_bias=true in config.json is not supported; allowed: false",
        ),
        (
            QWEN3,
            {"hidden_act": "gelu"},
            "Qwen3ForCausalLM: hidden_act='gelu' in config.json is not supported; allowed: 'silu'",
        ),
        (
            QWEN3,
            {"quantization_config": {"quant_method": "gptq"}},
            "Qwen3ForCausalLM, quantization_config: quant_method='gptq' in config.json is not supported; "
            "allowed: 'fp8', 'mxfp4'",
        ),
        (
            QWEN3,
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "Qwen3ForCausalLM, quantization_config: weight_block_size=[128] in config.json is not supported; "
            "allowed: rows and columns: [128, 128]",
        ),
        (
            QWEN3,
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "Qwen3ForCausalLM, rope_scaling: rope_type='yarn' in config.json is not supported; allowed: default",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "LlamaForCausalLM, rope_parameters: rope_type='linear' in config.json is not supported; "
            "allowed: default, llama3",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0}},
            "LlamaForCausalLM, rope_parameters: config.json has no high_freq_factor, which is needed; add it",
        ),
        (
            QWEN3,
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "Qwen3ForCausalLM: rope_parameters={'full_attention': {'rope_type': 'default'}} in config.json is not "
            "supported; allowed: one object with rope_type and rope_theta for all layers",
        ),
        (
            LLAMA,
            {"head_dim": None, "hidden_size": 190},
            "LlamaForCausalLM: hidden_size=190 in config.json is not supported; "
            "allowed: a multiple of num_attention_heads=8, or head_dim stated",
        ),
        (
            QWEN3,
            {"partial_rotary_factor": 0.5},
            "Qwen3ForCausalLM, rope_parameters: partial_rotary_factor=0.5 in config.json is not supported; "
            "allowed: 1.0",
        ),
        (
            QWEN3,
            {"num_key_value_heads": 3},
            "Qwen3ForCausalLM: num_key_value_heads=3 in config.json is not supported; "
            "allowed: a divisor of num_attention_heads: 1, 2, 4, 8",
        ),
        (
            QWEN3,
            {"head_dim": 47},
            "Qwen3ForCausalLM: head_dim=47 in config.json is not supported; "
            "allowed: an even number, which rotary positions need",
        ),
        (
            QWEN3,
            {"vocab_size": None},
            "Qwen3ForCausalLM: config.json has no vocab_size, which is needed; add it",
        ),
        (
            QWEN3,
            {"hidden_size": "192"},
            "Qwen3ForCausalLM: hidden_size='192' in config.json is not supported; allowed: an integer of at least 1",
        ),
        (
            QWEN3,
            {"use_sliding_window": True, "layer_types": ["chunked_attention"]},
            "Qwen3ForCausalLM: layer_types=['chunked_attention'] in config.json is not supported; "
            "allowed: a list of 4 out of full_attention, sliding_attention",
        ),
        (
            MOE,
            {"num_experts_per_tok": 9},
            "Qwen3MoeForCausalLM: num_experts_per_tok=9 in config.json is not supported; "
            "allowed: 1 to num_experts=8",
        ),
        (
            MOE,
            {"norm_topk_prob": 1},
            "Qwen3MoeForCausalLM: norm_topk_prob=1 in config.json is not supported; allowed: true or false",
        ),
        (
            MOE,
            {"mlp_only_layers": [-1]},
            "Qwen3MoeForCausalLM: mlp_only_layers=[-1] in config.json is not supported; "
            "allowed: a list of layer numbers",
        ),
        (
            GPT_OSS,
            {"attention_bias": False},
            "GptOssForCausalLM: attention_bias=false in config.json is not supported; allowed: true",
        ),
        (
            GPT_OSS,
            {"swiglu_alpha": 1.5},
            "GptOssForCausalLM: swiglu_alpha=1.5 in config.json is not supported; allowed: 1.702",
        ),
        (
            GPT_OSS,
            {"layer_types": ["full_attention"]},
            "GptOssForCausalLM: layer_types=['full_attention'] in config.json is not supported; "
            "allowed: a list of 4 out of full_attention, sliding_attention",
        ),
        (
            GPT_OSS,
            {"rope_parameters": YARN | {"mscale": 1.0}},
            "GptOssForCausalLM, rope_parameters: mscale=1.0 in config.json is not supported; allowed: leaving it out",
        ),
        *(
            (DEEPSEEK, change, f"DeepseekV3ForCausalLM{message}")
            for change, message in (
                (
                    {"scoring_func": "softmax"},
                    ": scoring_func='softmax' in config.json is not supported; allowed: 'sigmoid'",
                ),
                (
                    {"topk_method": "group_limited_greedy"},
                    ": topk_method='group_limited_greedy' in config.json is not supported; allowed: 'noaux_tc'",
                ),
                (
                    {"rope_interleave": False},
                    ": rope_interleave=false in config.json is not supported; allowed: true",
                ),
                (
                    {"num_key_value_heads": 4},
                    ": num_key_value_heads=4 in config.json is not supported; "
                    "allowed: num_attention_heads=8: every head has its own",
                ),
                (
                    {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
                    ", rope_parameters: mscale=1.0 in config.json is not supported; allowed: 0.7",
                ),
                (
                    {"rope_parameters": YARN},
                    ", rope_parameters: config.json has no mscale_all_dim, which is needed; add it",
                ),
                (
                    {
                        "rope_parameters": YARN
                        | {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.2}
                    },
                    ", rope_parameters: attention_factor=1.2 in config.json is not supported; "
                    "allowed: leaving it out",
                ),
                (
                    {"n_group": 16},
                    ": n_group=16 in config.json is not supported; "
                    "allowed: a divisor of n_routed_experts=16 that leaves two in a group",
                ),
                (
                    {"topk_group": 5},
                    ": topk_group=5 in config.json is not supported; allowed: 1 to n_group=4",
                ),
                (
                    {"num_experts_per_tok": 9},
                    ": num_experts_per_tok=9 in config.json is not supported; "
                    "allowed: 1 to 8, the experts of topk_group groups",
                ),
            )
        ),
    ],
)
def test_what_torchtitan_cannot_compute_is_refused_by_name(
    hf: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    changed = hf | change
    family = family_for(changed)
    for refuse in (family.model_config, family.views):
        with pytest.raises(UnsupportedModelError) as caught:
            refuse(changed)
        assert str(caught.value) == message


def test_unknown_architectures_are_refused_with_the_known_ones() -> None:
    known = (
        "DeepseekV3ForCausalLM, GptOssForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM"
    )
    allowed = f"allowed: {known}"
    with pytest.raises(
        UnsupportedModelError, match=f"^architecture MambaForCausalLM is not supported; {allowed}$"
    ):
        family_for({"architectures": ["MambaForCausalLM"]})
    with pytest.raises(UnsupportedModelError, match=rf"^config\.json names no architecture; {allowed}$"):
        family_for({})


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("Qwen3_5ForCausalLM", "TorchTitan's qwen3_5 imports Triton kernels when it is loaded"),
        (
            "Qwen3_5MoeForConditionalGeneration",
            "TorchTitan's qwen3_5 imports Triton kernels when it is loaded",
        ),
        ("MuseGlimmerForConditionalGeneration", "TorchTitan's muse_glimmer has a mesh axis of its own"),
    ],
)
def test_what_torchtitan_has_and_cannot_be_served_is_refused_with_the_reason(architecture, reason) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        family_for({"architectures": [architecture]})
    assert str(refused.value).startswith(
        f"architecture {architecture} is not supported ({reason}); allowed: "
    )


def test_qwen3_5_cannot_even_be_imported() -> None:
    """Else a forward outside of the engine could be held against transformers, as Muse Glimmer's is."""
    with pytest.raises(ModuleNotFoundError, match="No module named 'fla'"):
        importlib.import_module("torchtitan.models.qwen3_5")


def test_a_vocabulary_is_never_padded_to_less() -> None:
    with pytest.raises(
        ValueError, match="padded_vocab=776 is smaller than vocab_size=777; give at least that many rows"
    ):
        family_for(QWEN3).model_config(QWEN3, padded_vocab=776)


def test_a_model_that_hugging_face_cannot_express_is_not_written() -> None:
    config = family_for(MOE).model_config(MOE)
    config.layers[1].moe.router.score_func = "sigmoid"
    with pytest.raises(
        UnsupportedModelError, match=r"score_func=sigmoid.*cannot be written; allowed: softmax"
    ):
        family_for(MOE).hf_config(config)


def rope(**changed: float) -> dict[str, Any]:
    return {"rope_parameters": LLAMA["rope_parameters"] | changed}


@pytest.mark.parametrize(
    ("hf", "change", "message"),
    [
        (QWEN3, {"model_type": "llama"}, "architecture Qwen3ForCausalLM and model_type='llama'; .*'qwen3'"),
        (MOE, {"model_type": "qwen3"}, "Qwen3MoeForCausalLM and model_type='qwen3'; .*'qwen3_moe'"),
        (QWEN3, {"rms_norm_eps": math.inf}, "rms_norm_eps=inf"),
        (QWEN3, {"rms_norm_eps": math.nan}, "rms_norm_eps=nan"),
        (LLAMA, rope(high_freq_factor=1.0), "high_freq_factor=1.0.*more than low_freq"),
        (LLAMA, rope(low_freq_factor=8.0), "more than low_freq_factor=8.0"),
        (LLAMA, rope(factor=0), "factor=0"),
    ],
)  # fmt: skip
def test_contradictions_and_numbers_that_divide_by_zero_are_refused(hf, change, message) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        stated = hf | change
        family_for(stated).model_config(stated)


def test_a_config_is_read_from_a_directory_or_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=r"/nowhere does not exist; give a directory"):
        load_hf_config(tmp_path / "nowhere")
    with pytest.raises(BridgeError, match=r"has no config\.json; give a directory"):
        load_hf_config(tmp_path)
    file = tmp_path / "config.json"
    for text, message in (
        ("{", r"config\.json:1:2: not JSON"),
        ("[]", "holds a JSON list; it must be an object"),
        ('{"a": NaN}', "NaN is no finite number"),
        ('{"a": [-Infinity]}', "-Infinity is no finite number"),
        ('{"rms_norm_eps": 1e999}', "1e999 is no finite number"),
        ('{"a": {"tp": 1, "b": 2, "tp": 3}}', "'tp' is given twice"),
        ('{"a": ' + "1" * 5000 + "}", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ):
        file.write_text(text)
        for read in (load_hf_config, model_directory, read_config):
            with pytest.raises(BridgeError, match=message):
                read(tmp_path)
    file.write_text(json.dumps(QWEN3))
    assert load_hf_config(tmp_path) == load_hf_config(file) == QWEN3


def test_torchtitan_uses_the_accelerator_or_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = torch.accelerator.current_accelerator()
    monkeypatch.setattr(parallel_dims, "device_type", "cuda")
    expected = accelerator.type if accelerator is not None else "cpu"
    assert use_cpu_if_no_accelerator() == expected
    assert parallel_dims.device_type == expected
    assert use_cpu_if_no_accelerator() == expected


def test_a_model_that_adds_to_a_familys_belongs_to_no_family() -> None:
    # TorchTitan's Kimi K2.5 is a DeepSeek-V3 with a vision encoder.
    kimi = kimi_k2_5_configs["debugmodel"](attn_backend="flex", moe_comm_backend="standard")
    with pytest.raises(BridgeError, match=r"KimiK25Model\.Config belongs to no family here"):
        family_of(kimi)


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


def test_deepseek_of_torchtitan_that_config_json_cannot_state_is_refused() -> None:
    family = family_for(DEEPSEEK)
    spec = deepseek_v3.model_registry("671B", attn_backend="flex", moe_comm_backend="standard")
    with pytest.raises(UnsupportedModelError, match="eps=1e-05 of the norm of a latent cannot be written"):
        family.hf_config(spec.model)
    config = family.model_config(DEEPSEEK)
    config.layers[1].moe.router.score_func = "softmax"
    with pytest.raises(UnsupportedModelError, match="score_func=softmax, shared experts present"):
        family.hf_config(config)


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
