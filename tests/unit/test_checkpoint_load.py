"""Checkpoints straight into live tensors: what is in its place when."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from titan_bridge.checkpoint import load, open_checkpoint
from titan_bridge.checkpoint.dcp import write_metadata
from titan_bridge.checkpoint.finite import count_not_finite
from titan_bridge.checkpoint.job import Options
from titan_bridge.checkpoint.load import load_into
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.cpu import WORKERS
from titan_bridge.mesh import Sizes, padded_vocab
from titan_bridge.model_layout import layout
from titan_bridge.models import family_for
from titan_bridge.sharding import Box, Chunk, TensorMetadata
from titan_bridge.testing import make_checkpoint


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint in one file, in several, and in files two of which hold a slice of every sharded weight each."""
    folder = tmp_path_factory.mktemp("load")
    one = make_checkpoint(folder / "one", "llama3", num_hidden_layers=12, tokenizer=False)
    found = {"one": one}
    found["several"] = folder / "several"
    prepare(Options(source=one, target=found["several"], to="hf", max_shard_size=300_000)).run()
    assert len(list(found["several"].glob("*.safetensors"))) > 3
    prepare(Options(source=one, target=folder / "dcp", to="dcp")).run()
    found["slices"] = in_two_slices(folder / "dcp", folder / "slices")
    assert len(list(found["slices"].glob("*.distcp"))) == 2
    return found


def in_two_slices(whole: Path, target: Path) -> Path:
    """A DCP of two files, as two ranks of FSDP write it: each has half of the rows of every weight."""
    target.mkdir()
    files = {name: io.BytesIO() for name in ("__0_0.distcp", "__1_0.distcp")}
    tensors = {}
    with open_checkpoint(whole) as checkpoint:
        for name in checkpoint.tensors:
            tensor, chunks = checkpoint.read(name), []
            for (file, data), half in zip(files.items(), tensor.chunk(2), strict=True):
                torch.save(half.clone(), archive := io.BytesIO())
                first = tensor.shape[0] - half.shape[0] if chunks else 0
                box = Box.whole(half.shape).relative_to((-first, *[0] * (tensor.ndim - 1)))
                length = len(archive.getvalue())
                chunks.append(Chunk(owner=Path(file), box=box, offset=data.tell(), archive=length))
                data.write(archive.getvalue())
            tensors[name] = TensorMetadata(
                name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, chunks=tuple(chunks)
            )
    for file, data in files.items():
        (target / file).write_bytes(data.getvalue())
    write_metadata(target / ".metadata", tensors, {})
    return target


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["one", "several", "slices"])
def test_a_weight_is_told_of_once_it_is_whole_and_soon_after_it_was_begun(
    sources: dict[str, Path], kind: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_threads", lambda cpus, ranks: threads)
    hf: dict[str, Any] = json.loads((sources["one"] / "config.json").read_text())
    whole = layout(hf, Sizes())
    live = {
        fqn: torch.full(param.shape, torch.nan, dtype=getattr(torch, param.dtype))
        for fqn, param in whole.params.items()
    }
    begun: set[str] = set()
    told: dict[str, torch.Tensor] = {}
    most = 0

    def begin(fqn: str, *, whole: bool) -> None:
        assert whole
        assert fqn not in begun
        assert live[fqn].isnan().all()  # nothing was read yet
        begun.add(fqn)
        live[fqn] = live[fqn].clone()  # other memory, which is read into from here on

    def arrived(fqn: str) -> None:
        nonlocal most
        assert fqn not in told
        told[fqn] = live[fqn].clone()
        under_way = sum(not tensor.isnan().all() for name, tensor in live.items() if name not in told)
        most = max(most, under_way)

    with open_checkpoint(sources[kind]) as checkpoint:
        loaded = load_into(
            checkpoint, live, whole, 0,
            family=family_for(hf), hf=hf, padded_vocab=hf["vocab_size"], buffers={}, begin=begin, arrived=arrived,
        )  # fmt: skip
    assert loaded.bytes_read == loaded.bytes_planned == loaded.bytes_total
    assert told.keys() == begun == live.keys()
    for fqn, tensor in live.items():
        assert not tensor.isnan().any(), fqn
        assert torch.equal(told[fqn], tensor), fqn
    assert most < len(live) / 3


def test_a_weight_with_padding_is_not_said_to_be_read_whole(tmp_path: Path) -> None:
    source = make_checkpoint(
        tmp_path, "llama3", num_hidden_layers=1, vocab_size=257, tie_word_embeddings=False, tokenizer=False
    )
    hf = json.loads((source / "config.json").read_text())
    sizes = Sizes(tp=2)
    assert padded_vocab(257, sizes) == 258
    served = layout(hf, sizes)
    for rank in (0, 1):
        live = {fqn: torch.zeros(served.local_shape(fqn, rank)) for fqn in served.params}
        told: dict[str, bool] = {}
        with open_checkpoint(source) as checkpoint:
            load_into(
                checkpoint, live, served, rank, family=family_for(hf), hf=hf, padded_vocab=258, buffers={},
                begin=lambda fqn, *, whole, told=told: told.update({fqn: whole}),
            )  # fmt: skip
        assert told.keys() == live.keys()
        padded = {fqn for fqn, whole in told.items() if not whole}
        assert padded == ({"tok_embeddings.weight", "lm_head.weight"} if rank else set())


def test_a_weight_is_put_together_from_tensors_of_different_types(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """q in bfloat16 beside k and v in float32, as some tools write them; the live wqkv takes all three."""
    hf: dict[str, Any] = json.loads((sources["one"] / "config.json").read_text())
    where, tensors = layout(hf, Sizes()), load_file(sources["one"] / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items() if "q_proj" in name}
    found = []
    for number, changed in enumerate((rounded, {name: tensor.float() for name, tensor in rounded.items()})):
        (folder := tmp_path / str(number)).mkdir()
        save_file(tensors | changed, folder / "model.safetensors")
        live = {fqn: torch.zeros(param.shape) for fqn, param in where.params.items()}
        with open_checkpoint(folder) as checkpoint:
            load_into(
                checkpoint, live, where, 0, family=family_for(hf), hf=hf, padded_vocab=hf["vocab_size"], buffers={}
            )  # fmt: skip
        found.append(live)
    for fqn, tensor in found[0].items():
        assert torch.equal(tensor, found[1][fqn]), fqn


def test_cores_are_shared_out_among_the_workers_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = frozenset(range(16))
    monkeypatch.delenv(WORKERS, raising=False)
    assert load._threads(cpus, 8) == 1
    monkeypatch.setenv(WORKERS, "4")  # the other half is on another machine
    assert load._threads(cpus, 8) == 3


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_not_finite_is_counted_by_each_rank_in_what_it_holds(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_threads", lambda cpus, ranks: threads)
    source = make_checkpoint(tmp_path, "llama3", num_hidden_layers=2, tokenizer=False)
    state = load_file(source / "model.safetensors")
    state["model.norm.weight"][3:5] = math.nan
    state["model.layers.1.mlp.down_proj.weight"][0, :2] = -math.inf
    state["model.layers.0.mlp.up_proj.weight"][-1, 0] = 1e6  # too large for float16
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads((source / "config.json").read_text())
    served = layout(hf, Sizes(tp=2))
    found = []
    for rank in (0, 1):
        live = {fqn: torch.zeros(served.local_shape(fqn, rank), dtype=torch.float16) for fqn in served.params}
        with open_checkpoint(source) as checkpoint:
            loaded = load_into(
                checkpoint, live, served, rank, family=family_for(hf), hf=hf, padded_vocab=768, buffers={}
            )
        assert loaded.dtypes == ("float32",)
        found.append((loaded.nan, loaded.inf))
    nan = {"norm.weight": 2}  # on every rank
    assert found == [
        (nan, {"layers.1.feed_forward.w2.weight": 2}),
        (nan, {"layers.0.feed_forward.w3.weight": 1}),
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2]
)
@pytest.mark.parametrize(
    "odd", [(), (math.nan,), (math.inf,), (-math.inf,), (math.inf, -math.inf), (math.nan, math.inf)]
)
def test_a_sum_that_overflows_is_told_from_what_is_not_finite(dtype, odd):
    values = torch.full((1001,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    values[7 : 7 + len(odd)] = torch.tensor(odd, dtype=torch.float64).to(dtype)
    nan = sum(map(math.isnan, odd))
    assert count_not_finite(values) == (nan, len(odd) - nan)
    assert count_not_finite(values[:7]) == (0, 0)
