"""Views against TorchTitan's own state-dict adapters, and as a partition of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter
from torchtitan.models.gpt_oss.state_dict_adapter import GptOssStateDictAdapter
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter

from titan_bridge.models import family_for
from titan_bridge.models.build import build_on_meta, materialize

_COMMON = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
}
_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
}
_DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "q_lora_rank": 14,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "n_shared_experts": 2,
}
_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "intermediate_size": 10,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default"},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama3": _COMMON | {"architectures": ["LlamaForCausalLM"]},
    "llama3-tied": _COMMON | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "llama3-mha": _COMMON | {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4},
    "llama3-mqa": _COMMON | {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1},
    "qwen3": _COMMON | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 10},
    "qwen3-tied": _COMMON | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "moe": _COMMON | _MOE,
    "moe-mixed": _COMMON | _MOE | {"mlp_only_layers": [0]},
    "gpt-oss": _COMMON | _GPT_OSS,
    "deepseek": _COMMON | _DEEPSEEK,
    "deepseek-without-q-latent": _COMMON | _DEEPSEEK | {"q_lora_rank": None},
}
ADAPTERS = {
    "llama3": Llama3StateDictAdapter,
    "qwen3": Qwen3StateDictAdapter,
    "moe": Qwen3StateDictAdapter,
    "deepseek": DeepSeekV3StateDictAdapter,
    "gpt": GptOssStateDictAdapter,
}


def tensors_of(model: Decoder) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of the live model."""
    persistent = model.state_dict().keys()
    return dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in persistent}


def random_model(hf: dict[str, Any], **options: Any) -> Decoder:
    model = materialize(build_on_meta(family_for(hf).model_config(hf, **options), dtype=torch.float32), "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            tensor.normal_(generator=generator)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused_qkv", [True, False])
def test_reading_every_view_is_torchtitans_own_conversion(name: str, fused_qkv: bool) -> None:
    hf = MODELS[name]
    model = random_model(hf)
    adapter_class = ADAPTERS[name.partition("-")[0]]
    # TorchTitan's state dict has wq, wk and wv where the live model has wqkv.
    state = model.state_dict()
    expected = adapter_class(model.config, None).to_hf(dict(state))
    tensors = tensors_of(model) if fused_qkv else state
    views = family_for(hf).views(hf, fused_qkv=fused_qkv)
    names = {view.name for view in views}
    assert expected.keys() <= names
    # TorchTitan's adapter drops gpt-oss's experts; they are held against transformers in test_models_reference.py.
    dropped = {name for name in names if ".mlp.experts." in name} if name == "gpt-oss" else set()
    assert names - expected.keys() == dropped
    for view in views:
        read = view.read(tensors[view.fqn])
        assert tuple(read.shape) == view.shape
        assert view.name in dropped or torch.equal(read, expected[view.name]), view.name


@pytest.mark.parametrize("name", MODELS)
def test_views_cover_every_element_of_every_tensor_exactly_once(name: str) -> None:
    hf = MODELS[name]
    shapes = {fqn: tensor.shape for fqn, tensor in tensors_of(random_model(hf)).items()}
    read: dict[str, list[torch.Tensor]] = {fqn: [] for fqn in shapes}
    for view in family_for(hf).views(hf):
        assert view.titan_shape == tuple(shapes[view.fqn])
        numbers = torch.arange(shapes[view.fqn].numel()).reshape(shapes[view.fqn])
        read[view.fqn].append(view.read(numbers).flatten())
    for fqn, parts in read.items():
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(shapes[fqn].numel())), fqn


@pytest.mark.parametrize("name", MODELS)
def test_writing_what_was_read_gives_the_same_model(name: str) -> None:
    hf = MODELS[name]
    model, other = random_model(hf), random_model(hf)
    source, target = tensors_of(model), tensors_of(other)
    with torch.no_grad():
        for parameter in target.values():
            parameter.fill_(float("nan"))
        for view in family_for(hf).views(hf):
            view.write(target[view.fqn].data, view.read(source[view.fqn]))
    for fqn, parameter in source.items():
        assert torch.equal(parameter, target[fqn]), fqn


def test_padding_rows_of_the_vocabulary_belong_to_no_view() -> None:
    hf = MODELS["qwen3"]
    model = random_model(hf, padded_vocab=40)
    assert model.lm_head.weight.shape == (40, 24)
    views = {view.name: view for view in family_for(hf).views(hf, padded_vocab=40)}
    for name, fqn in (
        ("lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "tok_embeddings.weight"),
    ):
        weight = model.get_parameter(fqn)
        assert torch.equal(views[name].read(weight), weight[:37])


def test_a_tied_checkpoint_may_repeat_the_embedding_as_its_head() -> None:
    hf = MODELS["qwen3-tied"]
    family = family_for(hf)
    assert "lm_head.weight" not in {view.name for view in family.views(hf)}
    (head,) = family.optional_views(hf)
    assert (head.name, head.fqn) == ("lm_head.weight", "tok_embeddings.weight")
    assert family.tied_names(hf) == {"lm_head.weight": "tok_embeddings.weight"}
    untied = MODELS["qwen3"]
    assert (family.optional_views(untied), family.tied_names(untied)) == ((), {})


def test_a_tie_survives_materialisation() -> None:
    model = random_model(MODELS["qwen3-tied"])
    assert model.lm_head.weight is model.tok_embeddings.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_rotary_frequencies_in_old_checkpoints_are_ignored() -> None:
    hf = MODELS["llama3"]
    assert family_for(hf).ignores("model.layers.0.self_attn.rotary_emb.inv_freq", hf)
    assert not family_for(hf).ignores("model.layers.0.self_attn.q_proj.weight", hf)


def test_layers_past_the_last_are_left_out() -> None:
    hf = MODELS["deepseek"] | {"num_nextn_predict_layers": 1}
    ignores = family_for(hf).ignores
    assert ignores("model.layers.2.eh_proj.weight", hf)
    assert ignores("model.layers.2.mlp.experts.0.up_proj.weight", hf)
    assert not ignores("model.layers.1.mlp.experts.0.up_proj.weight", hf)
    assert not ignores("model.layers.3.eh_proj.weight", hf)
    assert not ignores("model.layers.2.eh_proj.weight", hf | {"num_nextn_predict_layers": 0})
