"""The tokenizer of a training run: bytes, trained on the text, or given; always as Hugging Face files.

TorchTitan, transformers and vLLM read the same files, so what the model learnt to read is what it is served with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from titan_bridge.config.train_schema import Data
from titan_bridge.errors import BridgeError

END = "<|endoftext|>"
"""Ends a document; the only special token of a tokenizer that is made here."""

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Names under which Hugging Face tokenizers are stored."""

TEXT_TO_TRAIN_ON = 4_000_000
"""Bytes of text that a tokenizer is trained on at most."""


def planned_size(data: Data) -> int:
    """Entries that the tokenizer of `data` will have at most, before it is made.

    Raises:
        BridgeError: a given folder without a tokenizer.
    """
    if data.tokenizer == "bytes":
        return 257
    if data.tokenizer == "train":
        return data.vocab_size
    return size_of(Path(data.tokenizer))


def size_of(folder: Path) -> int:
    """Entries of the tokenizer in a folder, special tokens included.

    Raises:
        BridgeError: no tokenizer.json there, or one that cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise BridgeError(
            f"data.tokenizer = {str(folder)!r} has no tokenizer.json; give bytes, train, or a folder that has one"
        )
    try:
        return Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True)
    except Exception as error:  # the library raises plain Exception
        raise BridgeError(f"{file} cannot be read as a tokenizer: {error}") from None


def make(data: Data, texts: Iterable[str], folder: Path, *, max_length: int) -> None:
    """Write the tokenizer files of `data` into `folder`.

    Args:
        texts: what a tokenizer is trained on.
        max_length: `model_max_length` in tokens.
    """
    if data.tokenizer not in ("bytes", "train"):
        copy(Path(data.tokenizer), folder)
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=planned_size(data),
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts if data.tokenizer == "train" else (), trainer=trainer)
    # Not tokenizer.save: its error on a full disk is no OSError.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def copy(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of one folder into another."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def files_in(folder: Path) -> tuple[str, ...]:
    """Names of the tokenizer files in a folder."""
    return tuple(name for name in FILES if (folder / name).is_file())


def eos_token_id(folder: Path) -> int | None:
    """Id of the token that ends a document, or None."""
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() or not (folder / "tokenizer.json").is_file():
        return None
    token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return None if token is None else Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)
