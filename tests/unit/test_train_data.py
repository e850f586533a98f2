"""Local text: which files, cut into documents; the tokenizer; through TorchTitan's data loader."""

from __future__ import annotations

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

from titan_bridge.config.train_schema import Data
from titan_bridge.errors import BridgeError
from titan_bridge.train import data, tokenizer


def text_of(documents: data.Documents) -> dict[str, bytes]:
    """The bytes of every file, put together from its pieces."""
    found: dict[str, dict[int, bytes]] = {}
    for path, start, stop in documents.pieces:
        with open(path, "rb") as file:
            file.seek(start)
            found.setdefault(path, {})[start] = file.read(stop - start)
    return {path: b"".join(parts[start] for start in sorted(parts)) for path, parts in found.items()}


@settings(max_examples=30, deadline=None)
@given(
    lines=st.lists(st.text("abcä\t ", max_size=60), min_size=1, max_size=80),
    longest=st.integers(64, 400),
    ranks=st.integers(1, 4),
)
def test_every_byte_is_in_exactly_one_document(tmp_path_factory, lines, longest, ranks):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("\n".join(lines) + "x" * 300)
    (folder / "b.txt").write_text("\n".join(reversed(lines)) + "y" * 300)
    documents = data.find_documents(Data(path=str(folder), longest=longest), ranks=ranks)
    assert text_of(documents) == {str(file): file.read_bytes() for file in folder.iterdir()}
    assert len(documents.pieces) >= ranks
    assert sum(stop - start for _, start, stop in documents.pieces) == documents.size


def test_documents_are_cut_at_ends_of_lines(tmp_path):
    (tmp_path / "a.txt").write_text("a line of text\n" * 200)
    documents = data.find_documents(Data(path=str(tmp_path), longest=100), ranks=1)
    pieces = [data.read_piece(dict(zip(("path", "start", "stop"), p, strict=True))) for p in documents.pieces]
    assert len(pieces) > 20
    assert all(piece.endswith("\n") for piece in pieces)


def test_the_order_is_the_seeds(tmp_path):
    def order(seed: int) -> tuple:
        return data.find_documents(Data(path="stdlib", seed=seed), ranks=2).pieces

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == sorted(order(2))
    assert not any("/site-packages/" in path or "/test/" in path for path, _, _ in order(1))


def test_only_text_is_taken_and_patterns_choose(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.txt").write_text("text " * 40)
    (tmp_path / "b.md").write_text("text " * 40)
    (tmp_path / "c.txt").write_bytes(b"\x00\x01binary" * 50)
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xfd" * 50)
    (tmp_path / ".hidden.txt").write_text("text " * 40)

    def names(pattern: str) -> set[str]:
        found = data.find_documents(Data(path=str(tmp_path), pattern=pattern), ranks=1)
        return {path.rsplit("/", 1)[-1] for path, _, _ in found.pieces}

    assert names("*") == {"a.txt", "b.md"}
    assert names("*.txt") == {"a.txt"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "holds no text in files named *; give a UTF-8 text file"),
        (lambda folder: (folder / "a.txt").touch(), "holds no text"),
        (lambda folder: (folder / "a.bin").write_bytes(bytes(999)), "holds no text"),
        (lambda folder: (folder / "a.txt").write_text("word"), "too little for 2 data ranks"),
    ],
)
def test_a_path_without_text_is_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(BridgeError) as caught:
        data.find_documents(Data(path=str(tmp_path)), ranks=2)
    assert message in str(caught.value)


def test_a_path_that_does_not_exist_is_refused():
    with pytest.raises(
        BridgeError, match="'/nowhere' does not exist; give a text file, a folder of them, or stdlib"
    ):
        data.find_documents(Data(path="/nowhere"), ranks=1)


def test_a_text_that_changed_is_noticed(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("text\n" * 100)
    documents = data.find_documents(Data(path=str(file)), ranks=1)
    documents.write(tmp_path / "documents.json")
    assert data.Documents.read(tmp_path / "documents.json") == documents
    assert documents.missing() is None
    file.write_text("text\n" * 99)
    assert documents.missing() == str(file)


@pytest.mark.parametrize("kind", ["bytes", "train"])
def test_tokenizers_keep_every_byte_and_are_one_for_torchtitan_and_transformers(tmp_path, kind):
    given = Data(tokenizer=kind, vocab_size=300)
    sample = "def f(self):\n\treturn 'é€😀' # \x07 two  spaces"
    tokenizer.make(given, ["def f(self): return 1\n"] * 50, tmp_path, max_length=128)
    ours = HuggingFaceTokenizer.Config().build(tokenizer_path=str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode(sample)
    assert ids == theirs(sample)["input_ids"]
    assert theirs.decode(ids) == sample
    assert ours.eos_id == theirs.eos_token_id == tokenizer.eos_token_id(tmp_path)
    assert tokenizer.size_of(tmp_path) <= tokenizer.planned_size(given)
    if kind == "bytes":
        assert len(ids) == len(sample.encode())
        assert tokenizer.size_of(tmp_path) == tokenizer.planned_size(given) == 257


def test_a_given_tokenizer_is_copied(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "from").mkdir()
    tokenizer.make(Data(tokenizer="bytes"), (), tmp_path / "from", max_length=64)
    given = Data(tokenizer=str(tmp_path / "from"))
    assert tokenizer.planned_size(given) == 257
    tokenizer.make(given, (), tmp_path / "to", max_length=64)
    assert tokenizer.files_in(tmp_path / "to") == ("tokenizer.json", "tokenizer_config.json")
    (tmp_path / "from/tokenizer.json").write_text("{")
    with pytest.raises(BridgeError, match="cannot be read as a tokenizer"):
        tokenizer.planned_size(given)


def test_no_character_is_cut(tmp_path):
    (tmp_path / "a.txt").write_text("äö€𝄞" * 500, encoding="utf-8")
    documents = data.find_documents(Data(path=str(tmp_path), tokenizer="bytes", longest=101), ranks=1)
    pieces = [dict(zip(("path", "start", "stop"), piece, strict=True)) for piece in documents.pieces]
    texts = [data.read_piece(piece) for piece in sorted(pieces, key=lambda piece: piece["start"])]
    assert len(texts) > 5
    assert "".join(texts) == "äö€𝄞" * 500


@pytest.mark.parametrize("pattern", ["/x*", "**.py"])
def test_a_pattern_that_is_none_is_refused(pattern, tmp_path):
    with pytest.raises(BridgeError, match=r"data\.pattern = "):
        data.find_documents(Data(path=str(tmp_path), pattern=pattern), ranks=1)


def test_torchtitans_data_loader_reads_the_text_in_order(tmp_path):
    """Two ranks together see every document, once an epoch, in the order of the list."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("".join(f"line {n}\n" for n in range(400)))
    given = Data(path=str(tmp_path / "text"), tokenizer="bytes", longest=256)
    documents = data.find_documents(given, ranks=2)
    documents.write(tmp_path / "documents.json")
    tokenizer.make(given, (), tmp_path, max_length=64)
    built = HuggingFaceTokenizer.Config().build(tokenizer_path=str(tmp_path))
    data.register()
    seen = []
    for rank in range(2):
        loader = HuggingFaceTextDataLoader.Config(
            dataset=data.NAME, dataset_path=str(tmp_path / "documents.json"), infinite=False
        ).build(dp_world_size=2, dp_rank=rank, tokenizer=built, seq_len=16, local_batch_size=1)
        tokens = [token for inputs, _ in loader for token in inputs["input"].flatten().tolist()]
        half = len(documents.pieces) // 2
        mine = documents.pieces[:half] if rank == 0 else documents.pieces[half:]
        expected = []
        for piece in mine:
            row = dict(zip(("path", "start", "stop"), piece, strict=True))
            expected += built.encode(data.read_piece(row), add_bos=True, add_eos=True)[:-1]
        assert tokens == expected[: len(tokens)]
        assert len(expected) - len(tokens) < 16
        seen.append(len(tokens))
    assert min(seen) > 1000
    assert json.loads((tmp_path / "documents.json").read_text())["version"] == 1
