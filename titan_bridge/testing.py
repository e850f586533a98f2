"""Small checkpoints in Hugging Face format, made on the spot: random weights, a tokenizer trained on local
text.

For demos, tests and benchmarks. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from titan_bridge.errors import BridgeError
from titan_bridge.models import family_for
from titan_bridge.run_folder import CHECKPOINT, Record

FamilyName = Literal["llama3", "qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss"]

_CLASSES = {
    "llama3": "Llama",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "deepseek_v3": "DeepseekV3",
    "gpt_oss": "GptOss",
}
_EOS, _START, _END = "<|endoftext|>", "<|start|>", "<|end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
_COMMON = {
    "vocab_size": 768,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    # Small enough that all three ranges of frequencies occur.
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_BY_FAMILY: dict[str, dict[str, Any]] = {
    "llama3": {"head_dim": 16},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "num_key_value_heads": 8,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "head_dim": 16,
        "v_head_dim": 24,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 64,
        "num_mtp_layers": 0,
        "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "gpt_oss": {
        "intermediate_size": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "rope_parameters": _YARN | {"truncate": False},
    },
}


def make_checkpoint(
    path: str | os.PathLike[str],
    family: FamilyName = "qwen3_moe",
    *,
    seed: int = 0,
    std: float = 0.15,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "2GB",
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint with transformers' own classes, and a tokenizer that fits its vocabulary.

    Args:
        path: Directory, made if it is missing.
        family: Which model class.
        seed: The same seed and arguments give the same bytes.
        std: Standard deviation of every weight matrix; large enough that log-probabilities are not flat. Norm
            weights are spread around 1, so that an exchanged norm shows.
        dtype: Of the weights, and what config.json states.
        max_shard_size: Above it the weights are split over several files with an index.
        tokenizer: Write tokenizer files and a chat template, too.
        **overrides: Fields of the Hugging Face config, e.g. ``hidden_size=192``.

    Returns:
        ``path``.

    Raises:
        BridgeError: An unknown family, or a vocabulary too small for a byte-level tokenizer.
    """
    if family not in _CLASSES:
        raise BridgeError(f"family={family!r} is not one that can be made; allowed: {', '.join(_CLASSES)}")
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    settings = _COMMON | _BY_FAMILY[family] | overrides
    model = _random_model(family, settings, seed=seed, std=std, dtype=dtype)
    if tokenizer:
        made = make_tokenizer(settings["vocab_size"], max_length=settings["max_position_embeddings"])
        made.save_pretrained(directory)
        for holder in (model.config, model.generation_config):
            holder.bos_token_id, holder.eos_token_id, holder.pad_token_id = (
                None,
                made.eos_token_id,
                made.pad_token_id,
            )
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def _random_model(
    family: FamilyName, settings: dict[str, Any], *, seed: int, std: float, dtype: torch.dtype
) -> PreTrainedModel:
    """transformers' model, fit to be saved but not to be run: its rotary frequencies have no values."""
    config_class = getattr(transformers, f"{_CLASSES[family]}Config")
    model_class = getattr(transformers, f"{_CLASSES[family]}ForCausalLM")
    config: PreTrainedConfig = config_class(**settings)
    config.dtype = dtype
    # Skipping transformers' own initialisation halves the time for the larger test models.
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)
    model.to_empty(device="cpu").to(dtype).tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty(parameter.shape).normal_(std=std, generator=generator)
            parameter.copy_(noise + 1.0 if "norm" in name else noise)
        for module in model.modules():
            if "e_score_correction_bias" in module._buffers:
                bias = torch.empty(module._buffers["e_score_correction_bias"].shape, dtype=torch.float32)
                module._buffers["e_score_correction_bias"] = bias.normal_(std=std, generator=generator)
    return model


def make_tokenizer(vocab_size: int, *, max_length: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, trained on the Python standard library's sources.

    Args:
        vocab_size: Upper bound of the entries, special tokens included; more than 1024 are never learnt.
        max_length: ``model_max_length`` in the tokenizer's config, in tokens.

    Raises:
        BridgeError: ``vocab_size`` leaves no room for the 256 bytes and the special tokens.
    """
    if vocab_size < 260:
        raise BridgeError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer; give at least 260"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(min(vocab_size, 1024))),
        eos_token=_EOS,
        pad_token=_EOS,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


@cache
def _trained(vocab_size: int) -> str:
    """Serialized tokenizer; training takes about a second, so it is kept."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_EOS, _START, _END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_local_text(), trainer=trainer)
    return tokenizer.to_str()


def _local_text(limit: int = 1_000_000) -> Iterator[str]:
    """About ``limit`` characters of text that every Python installation has."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        yield text
        limit -= len(text)
        if limit <= 0:
            return


def make_run(out: str | os.PathLike[str], *models: Path) -> Path:
    """The output folder of a training run whose steps 1, 2, ... are Hugging Face exports: `models`, of one config."""
    folder = Path(out) / CHECKPOINT
    shutil.copytree(models[0], folder, ignore=shutil.ignore_patterns("model*.safetensors*"))
    for step, model in enumerate(models, start=1):
        (folder / f"step-{step}").mkdir()
        for file in model.glob("model*.safetensors*"):
            shutil.copy(file, folder / f"step-{step}")
    hf = json.loads((folder / "config.json").read_text())
    Record(
        family=family_for(hf).name, hf_config=hf, expert_bias=False, tokenizer=(), dtype="float32", sizes={}, nproc=1,
        config={}, origin={}, trainer={}, versions={},
    ).write(folder)  # fmt: skip
    return Path(out)


def titan_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """A checkpoint that `make_checkpoint` made, as TorchTitan's global tensors by FQN, in the checkpoint's dtype."""
    from titan_bridge.mesh import Sizes  # noqa: PLC0415
    from titan_bridge.model_layout import specs  # noqa: PLC0415  imports torchtitan, which making a checkpoint does not need
    from titan_bridge.models import family_for, load_hf_config  # noqa: PLC0415

    hf = load_hf_config(path)
    held = load_file(Path(path) / "model.safetensors")
    whole = {fqn: torch.zeros(known.shape, dtype=known.dtype) for fqn, known in specs(hf, Sizes()).items()}
    for view in family_for(hf).views(hf):
        view.write(whole[view.fqn], held[view.name])
    return whole
