"""Models and configs that are refused, by name and with what is allowed."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from torchtitan.models import deepseek_v3
from torchtitan.models.kimi_k2_7 import kimi_k2_5_configs

from tests.unit.config_samples import DEEPSEEK, GPT_OSS, LLAMA, MOE, QWEN3, YARN
from titan_bridge.checkpoint.hf import read_config
from titan_bridge.checks import model_directory
from titan_bridge.errors import BridgeError
from titan_bridge.models import UnsupportedModelError, family_for, family_of, load_hf_config


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


def test_a_model_that_adds_to_a_familys_belongs_to_no_family() -> None:
    # TorchTitan's Kimi K2.5 is a DeepSeek-V3 with a vision encoder.
    kimi = kimi_k2_5_configs["debugmodel"](attn_backend="flex", moe_comm_backend="standard")
    with pytest.raises(BridgeError, match=r"KimiK25Model\.Config belongs to no family here"):
        family_of(kimi)


def test_deepseek_of_torchtitan_that_config_json_cannot_state_is_refused() -> None:
    family = family_for(DEEPSEEK)
    spec = deepseek_v3.model_registry("671B", attn_backend="flex", moe_comm_backend="standard")
    with pytest.raises(UnsupportedModelError, match="eps=1e-05 of the norm of a latent cannot be written"):
        family.hf_config(spec.model)
    config = family.model_config(DEEPSEEK)
    config.layers[1].moe.router.score_func = "softmax"
    with pytest.raises(UnsupportedModelError, match="score_func=softmax, shared experts present"):
        family.hf_config(config)
