"""TorchTitan's forward pass on a checkpoint equals transformers', in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from titan_bridge.errors import BridgeError
from titan_bridge.reference import load_reference
from titan_bridge.testing import make_checkpoint, make_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Small enough that all three ranges of frequencies occur.
    "original_max_position_embeddings": 64,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 50000.0}
KIMI_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama3", {}),
    "llama3-tied": ("llama3", {"tie_word_embeddings": True}),
    "llama3-scaled": ("llama3", {"rope_parameters": LLAMA3_ROPE}),
    "llama3-scaled-tied": ("llama3", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama3-mha-wide-heads": ("llama3", {"num_key_value_heads": 8, "head_dim": 32}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-head-dim-48": ("qwen3", {"hidden_size": 192, "num_attention_heads": 8, "head_dim": 48}),
    "qwen3-odd-vocab": ("qwen3", {"vocab_size": 777}),
    "qwen3-windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "moe": ("qwen3_moe", {}),
    "moe-not-renormalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "moe-mixed": ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "moe-tied": ("qwen3_moe", {"tie_word_embeddings": True}),
    "moe-odd-vocab": ("qwen3_moe", {"vocab_size": 777}),
    "moe-windows": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
    "deepseek": ("deepseek_v3", {"num_hidden_layers": 3}),
    "deepseek-without-q-latent": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek-all-sparse-two-shared": ("deepseek_v3", {"first_k_dense_replace": 0, "n_shared_experts": 2}),
    "deepseek-not-renormalised": ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.7}),
    "deepseek-tied-odd-vocab": ("deepseek_v3", {"tie_word_embeddings": True, "vocab_size": 777}),
    "kimi-k2": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "rope_parameters": KIMI_ROPE}),
    "gpt-oss": ("gpt_oss", {"num_hidden_layers": 3}),
    "gpt-oss-plain-rope": ("gpt_oss", {"rope_parameters": PLAIN_ROPE}),
    "gpt-oss-windows-everywhere": (
        "gpt_oss",
        {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2},
    ),
    "gpt-oss-no-window-clamped": ("gpt_oss", {"layer_types": ["full_attention"] * 2, "swiglu_limit": 0.5}),
    "gpt-oss-tied-odd-vocab": ("gpt_oss", {"tie_word_embeddings": True, "vocab_size": 777}),
    "moonlight": (
        "deepseek_v3",
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": PLAIN_ROPE},
    ),
}


def tokens(vocab: int, length: int = 96) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(7)).tolist()


def transformers_logprobs(path: Path, token_ids: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([token_ids])).logits[0].float(), dim=-1)


@pytest.mark.parametrize("name", VARIANTS)
def test_logprobs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[name]
    path = make_checkpoint(tmp_path, family, tokenizer=False, **overrides)  # type: ignore[arg-type]
    token_ids = tokens(overrides.get("vocab_size", 768))
    theirs, ours = transformers_logprobs(path, token_ids), load_reference(path).logprobs(token_ids)
    difference = (theirs - ours).abs().max().item()
    # Measured on one CPU: 0 for Qwen3 and at most 1.5e-5 for Llama 3, whose rotation is written differently.
    assert difference <= 1e-4
    assert theirs.std() > 1.0, "flat log-probabilities would agree whatever the weights"


def test_a_config_in_the_older_spelling_gives_the_same_numbers(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama3", tokenizer=False, rope_parameters=LLAMA3_ROPE)
    token_ids = tokens(768)
    newer = load_reference(path).logprobs(token_ids)
    config = json.loads((path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_reference(path).logprobs(token_ids), newer)
    assert (transformers_logprobs(path, token_ids) - newer).abs().max() <= 1e-4


def test_settings_that_matter_change_the_numbers(tmp_path: Path) -> None:
    # Without this, a setting that both sides ignore would pass the comparison above.
    token_ids = tokens(768)
    for family, change in (
        ("llama3", {"rope_parameters": LLAMA3_ROPE}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v3", {"rope_parameters": KIMI_ROPE}),
        ("gpt_oss", {"swiglu_limit": 0.5}),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}),
    ):
        plain = make_checkpoint(tmp_path / f"{family}-plain", family, tokenizer=False)  # type: ignore[arg-type]
        changed = make_checkpoint(tmp_path / f"{family}-changed", family, tokenizer=False, **change)  # type: ignore[arg-type]
        difference = (
            (load_reference(plain).logprobs(token_ids) - load_reference(changed).logprobs(token_ids))
            .abs()
            .max()
        )
        assert difference > 1e-2, change


def test_a_checkpoint_in_several_files_is_read_whole(tmp_path: Path) -> None:
    one = make_checkpoint(tmp_path / "one", "qwen3_moe", tokenizer=False)
    many = make_checkpoint(tmp_path / "many", "qwen3_moe", tokenizer=False, max_shard_size="300KB")
    assert len(list(many.glob("*.safetensors"))) > 1
    token_ids = tokens(768)
    assert torch.equal(load_reference(one).logprobs(token_ids), load_reference(many).logprobs(token_ids))


def test_a_tied_checkpoint_that_repeats_its_head_is_read(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3", tokenizer=False, tie_word_embeddings=True)
    token_ids = tokens(768)
    before = load_reference(path).logprobs(token_ids)
    weights = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path / "model.safetensors")
    assert torch.equal(load_reference(path).logprobs(token_ids), before)


def test_all_tensors_that_do_not_fit_are_named_in_one_error(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3", tokenizer=False)
    weights = load_file(path / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.extra.weight"] = torch.zeros(3)
    weights["lm_head.weight"] = weights["lm_head.weight"][:5].clone()
    save_file(weights, path / "model.safetensors")
    with pytest.raises(BridgeError) as caught:
        load_reference(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "missing: model.norm.weight",
        "unexpected: model.extra.weight",
        "lm_head.weight has shape (5, 128), config.json says (768, 128)",
    ):
        assert part in message


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3", tokenizer=False)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        BridgeError, match=r"model\.safetensors has \d+ bytes; its header describes \d+: truncated"
    ):
        load_reference(path)
    file.unlink()
    with pytest.raises(BridgeError, match="holds no weights; give a directory with a checkpoint"):
        load_reference(path)


def test_tokens_outside_the_model_are_refused(tmp_path: Path) -> None:
    reference = load_reference(make_checkpoint(tmp_path, "qwen3", tokenizer=False, max_position_embeddings=8))
    for bad, message in (
        ([], "0 tokens given; allowed: 1 to max_position_embeddings=8"),
        ([0] * 9, "9 tokens given; allowed: 1 to max_position_embeddings=8"),
        ([768], "token 768 given; allowed: 0 to vocab_size-1=767"),
    ):
        with pytest.raises(BridgeError, match=message):
            reference.logits(bad)


def test_made_checkpoints_are_the_same_each_time_and_differ_by_seed(tmp_path: Path) -> None:
    paths = [make_checkpoint(tmp_path / str(i), "llama3", seed=seed) for i, seed in enumerate((0, 0, 1))]
    first, second, third = ((path / "model.safetensors").read_bytes() for path in paths)
    assert first == second
    assert first != third
    assert (paths[0] / "tokenizer.json").read_bytes() == (paths[1] / "tokenizer.json").read_bytes()


def test_a_made_tokenizer_fits_the_vocabulary_and_round_trips_text(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3", vocab_size=777)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = "def f(x):\n    return {'ü': x, '日本': 2}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert max(tokenizer.get_vocab().values()) < 777
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert transformers.GenerationConfig.from_pretrained(path).eos_token_id == tokenizer.eos_token_id
    with pytest.raises(
        BridgeError, match="vocab_size=100 is too small for a byte-level tokenizer; give at least 260"
    ):
        make_tokenizer(100)


def test_only_known_families_are_made(tmp_path: Path) -> None:
    with pytest.raises(
        BridgeError,
        match="family='gpt2' is not one that can be made; allowed: llama3, qwen3, qwen3_moe, deepseek_v3, gpt_oss",
    ):
        make_checkpoint(tmp_path, "gpt2")  # type: ignore[arg-type]
