"""The formats, held against their own libraries: safetensors, torch.save and torch.load, zipfile, DCP."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import filesystem, metadata

from titan_bridge.checkpoint import open_checkpoint
from titan_bridge.checkpoint.archive import Archive, locate
from titan_bridge.checkpoint.dcp import METADATA, write_metadata
from titan_bridge.checkpoint.hf import header_bytes, read_header
from titan_bridge.errors import BridgeError
from titan_bridge.memory import bytes_of
from titan_bridge.sharding.boxes import Box
from titan_bridge.sharding.tensors import Chunk, TensorMetadata

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.float64,
]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def some_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(math.prod(shape)).reshape(shape) % 2**7).to(dtype)


def reader(data: bytes):
    return lambda offset, length: data[offset : offset + length]


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=5))
def test_safetensors_both_ways(tmp_path_factory, shapes):
    tensors = {f"t{i}": some_tensor(*one) for i, one in enumerate(shapes)}
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    # Theirs, read by us.
    save_file(tensors, path, metadata={"format": "pt"})
    entries, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    assert {name: (e.shape, e.dtype) for name, e in entries.items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
    }
    with open_checkpoint(path.parent) as checkpoint:
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)
    # Ours, read by them.
    head, offsets = header_bytes([(n, tuple(t.shape), t.dtype) for n, t in tensors.items()], {"format": "pt"})
    assert len(head) % 64 == 0
    assert offsets[0] == len(head)
    path.write_bytes(head + b"".join(bytes(bytes_of(t)) for t in tensors.values()))
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[name])


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, dtype=st.sampled_from(DTYPES))
def test_archives_both_ways(shape, dtype):
    tensor = some_tensor(shape, dtype)
    # Theirs, read by us.
    out = io.BytesIO()
    torch.save(tensor, out)
    found = locate(reader(out.getvalue()), len(out.getvalue()))
    assert (found.shape, found.dtype) == (shape, dtype)
    data = bytes(bytes_of(tensor))
    assert out.getvalue()[found.offset : found.offset + len(data)] == data
    # Ours, read by them and by zipfile, which checks the CRCs.
    archive = Archive(shape, dtype)
    made = data.join(archive.frame(zlib.crc32(data)))
    assert len(made) == archive.total_bytes
    assert archive.head_bytes % 64 == 0
    loaded = torch.load(io.BytesIO(made), weights_only=True)
    assert torch.equal(loaded, tensor)
    assert loaded.is_contiguous()
    assert zipfile.ZipFile(io.BytesIO(made)).testzip() is None
    # And ours by us.
    again = locate(reader(made), len(made))
    assert (again.offset, again.shape, again.dtype) == (archive.head_bytes, shape, dtype)


def test_a_slice_of_a_larger_storage_is_found():
    whole = torch.arange(100.0)
    out = io.BytesIO()
    torch.save(whole[10:30].view(4, 5), out)
    found = locate(reader(out.getvalue()), len(out.getvalue()))
    assert out.getvalue()[found.offset :][:80] == bytes(bytes_of(whole[10:30].clone()))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.arange(6.0).view(2, 3).t(), "strides"),
        ({"a": torch.zeros(2)}, "not a plain tensor"),
        (os.system, "refused"),
    ],
)
def test_archives_of_anything_else_are_refused(value, message):
    out = io.BytesIO()
    torch.save(value, out)
    with pytest.raises(BridgeError, match=message):
        locate(reader(out.getvalue()), len(out.getvalue()))


def training_state() -> dict:
    return {
        "layers.0.w": torch.randn(30, 4),
        "layers.1.w": torch.randn(8).bfloat16(),
        "scalar": torch.tensor(3.0),
        "optimizer": {"state.layers.0.w.exp_avg": torch.randn(30, 4), "param_groups.lr": 0.25},
        "lr_scheduler": {"last_epoch": 7},
        "train_state": {"step": torch.tensor(7)},
    }


def test_dcp_reads_model_and_leaves_training_state_out(tmp_path):
    state = training_state()
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with open_checkpoint(tmp_path / "dcp") as checkpoint:
        assert checkpoint.format == "dcp"
        assert set(checkpoint.tensors) == {"layers.0.w", "layers.1.w", "scalar"}
        assert checkpoint.left_out == 4
        for name in checkpoint.tensors:
            assert torch.equal(checkpoint.read(name), state[name])
        out = torch.empty(2, 7, dtype=torch.bfloat16).t()  # other dtype, other strides
        checkpoint.read_into("layers.0.w", Box(start=(3, 1), stop=(10, 3)), out)
        assert torch.equal(out, state["layers.0.w"][3:10, 1:3].bfloat16())
    with open_checkpoint(tmp_path / "dcp", extra=True) as checkpoint:
        moments = "optimizer.state.layers.0.w.exp_avg"
        assert torch.equal(checkpoint.read(moments), state["optimizer"]["state.layers.0.w.exp_avg"])
        assert set(checkpoint.blobs) == {"optimizer.param_groups.lr", "lr_scheduler.last_epoch"}
        assert checkpoint.paths[moments] == ("optimizer", "state.layers.0.w.exp_avg")


def test_a_model_under_its_own_key_loses_the_prefix(tmp_path):
    dcp.save({"model": {"a": {"b": torch.ones(2)}}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with open_checkpoint(tmp_path / "dcp") as checkpoint:
        assert list(checkpoint.tensors) == ["a.b"]


def described(name: str, shape: tuple[int, ...], dtype: torch.dtype, *chunks: Chunk) -> TensorMetadata:
    return TensorMetadata(name=name, shape=shape, dtype=dtype, chunks=chunks)


def test_metadata_that_we_write_is_read_by_dcp(tmp_path):
    tensor = torch.randn(6, 4)
    data, chunks = b"", []
    for rows in ((0, 2), (2, 6)):
        chunk = tensor[rows[0] : rows[1]]
        archive, raw = Archive(tuple(chunk.shape), chunk.dtype), bytes(bytes_of(chunk.contiguous()))
        box, length = Box(start=(rows[0], 0), stop=(rows[1], 4)), archive.total_bytes
        chunks.append(Chunk(owner=Path("__0_0.distcp"), offset=len(data), archive=length, box=box))
        data += raw.join(archive.frame(zlib.crc32(raw)))
    (tmp_path / "__0_0.distcp").write_bytes(data)
    stored = described("a", (6, 4), torch.float32, *chunks)
    write_metadata(tmp_path / METADATA, {"a": stored, "tied.a": stored}, {})
    state = {"a": torch.zeros(6, 4), "tied.a": torch.zeros(6, 4)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["a"], tensor)
    assert torch.equal(state["tied.a"], tensor)


def test_metadata_that_we_write_is_what_dcp_would_write(tmp_path):
    box = Box(start=(2, 0), stop=(6, 4))
    stored = described(
        "a", (6, 4), torch.bfloat16, Chunk(owner=Path("__0_0.distcp"), offset=7, archive=9, box=box)
    )
    blob = TensorMetadata.whole("optimizer.step", (5,), torch.uint8, Path("__1_0.distcp"))
    paths = {"optimizer.step": ("optimizer", "step")}
    write_metadata(tmp_path / METADATA, {"a": stored, "optimizer.step": blob}, paths)
    start, size = torch.Size(box.start), torch.Size(box.shape)
    theirs = metadata.Metadata(
        state_dict_metadata={
            "optimizer.step": metadata.BytesStorageMetadata(),
            "a": metadata.TensorStorageMetadata(
                properties=metadata.TensorProperties(dtype=torch.bfloat16),
                size=torch.Size((6, 4)),
                chunks=[metadata.ChunkStorageMetadata(offsets=start, sizes=size)],
            ),
        },
        planner_data={"optimizer.step": ("optimizer", "step"), "a": ("a",)},
        storage_data={
            metadata.MetadataIndex("a", start, 0): filesystem._StorageInfo("__0_0.distcp", 7, 9),
            metadata.MetadataIndex("optimizer.step"): filesystem._StorageInfo("__1_0.distcp", 0, 5),
        },
        storage_meta=metadata.StorageMeta(),
        version="1.0.0",
    )
    data = (tmp_path / METADATA).read_bytes()
    ours = pickle.loads(data)
    assert ours == theirs
    assert [index.index for index in ours.storage_data] == [index.index for index in theirs.storage_data]
    assert vars(ours.storage_meta) == vars(theirs.storage_meta)
    assert b"titan_bridge" not in data


class Hostile:
    """Unpickled by `pickle.load`, it makes a file."""

    def __init__(self, path: Path, how: str) -> None:
        self._made = {
            "system": (os.system, (f"touch {path}",)),
            "eval": (eval, (f"open({str(path)!r}, 'w')",)),
            "getattr": (getattr, (str, "upper")),
        }[how]

    def __reduce__(self):
        return self._made


@pytest.mark.parametrize("how", ["system", "eval", "getattr"])
@pytest.mark.parametrize("padding", [0, 5 << 20])
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path, how, padding):
    proof = tmp_path / "proof"
    (tmp_path / METADATA).write_bytes(pickle.dumps(["x" * padding, Hostile(proof, how)]))
    with pytest.raises(BridgeError, match="which no checkpoint needs; refused, nothing was run"):
        open_checkpoint(tmp_path)
    assert not proof.exists()


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd"])
def test_places_outside_the_directory_are_refused(tmp_path, file):
    box = Box(start=(0,), stop=(2,))
    stored = described("a", (2,), torch.float32, Chunk(owner=Path(file), archive=9, box=box))
    write_metadata(tmp_path / METADATA, {"a": stored}, {})
    with pytest.raises(BridgeError, match="refused"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/x.safetensors", ""])
def test_index_entries_outside_the_directory_are_refused(tmp_path, file):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(BridgeError, match=r"refused|relative path"):
        open_checkpoint(tmp_path)


def test_chunks_must_cover_their_tensor_once(tmp_path):
    (tmp_path / "f").write_bytes(bytes(9))
    for boxes, what in (
        ([((0,), (2,))], "hold 2 of 4"),
        ([((0,), (3,)), ((2,), (4,))], "overlap"),
        ([((0,), (9,))], "outside"),
    ):
        chunks = [
            metadata.ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size((stop[0] - start[0],)))
            for start, stop in boxes
        ]
        entry = metadata.TensorStorageMetadata(metadata.TensorProperties(), torch.Size((4,)), chunks)
        place = filesystem._StorageInfo("f", 0, 9)
        places = {metadata.MetadataIndex("a", chunk.offsets): place for chunk in chunks}
        data = metadata.Metadata(state_dict_metadata={"a": entry}, storage_data=places)
        (tmp_path / METADATA).write_bytes(pickle.dumps(data))
        with pytest.raises(BridgeError, match=what):
            open_checkpoint(tmp_path)


def header(tensors: dict, data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least 8"),
        ((10**9).to_bytes(8, "little") + b"{}", "truncated"),
        ((5).to_bytes(8, "little") + b"{}", "truncated"),
        (header({}) + b"x", "something follows"),
        ((2).to_bytes(8, "little") + b"[]", "must be an object"),
        ((3).to_bytes(8, "little") + b"{]}", "not JSON"),
        (header({"a": {"dtype": "F32", "shape": [1]}}), "exactly dtype"),
        (header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "F99"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "needs 8"),
        (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "whole numbers"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234"), "start and an end"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"), "end at 0"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"123"), "truncated"),
        (header({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"), "whole numbers"),
        (b'\x12\0\0\0\0\0\0\0{"a":1,"a":2}     ', "twice"),
    ],
)
def test_bad_headers_are_named(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BridgeError, match=message):
        open_checkpoint(tmp_path)


def test_files_and_index_must_agree(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, message in (
        ({"a": "x.safetensors"}, "b is in it but not in the index"),
        ({"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}, "c is not in it"),
        ({"a": "y.safetensors"}, "y.safetensors"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(BridgeError, match=message):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("optimizer_0.pt", r"written by torch.save \(config.json, optimizer_0.pt\), which is not read"),
        ("shard-00001-model-00001-of-00002.safetensors", "parts that each rank saved.*consolidate_safetensors_files"),
        ("pytorch_model.bin", r"holds pickles \(pytorch_model.bin\), which are not read.*save_pretrained"),
    ],
)  # fmt: skip
def test_files_of_others_are_named(tmp_path, file, message):
    for name in ("config.json", file):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(BridgeError, match=message):
        open_checkpoint(tmp_path)


def test_a_directory_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(BridgeError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(BridgeError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
