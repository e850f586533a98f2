"""Quantized weights are read as torch and transformers multiply them out, bit for bit, whatever part is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.unit.checkpoint_samples import assert_equal
from tests.unit.quantized_samples import FP8, MXFP4, make_fp8, make_mxfp4, multiplied_out, read, write
from titan_bridge.checkpoint import open_checkpoint, quantized
from titan_bridge.checkpoint.compare import fingerprints, open_sides
from titan_bridge.checkpoint.reshard import Options, prepare
from titan_bridge.errors import BridgeError
from titan_bridge.models import load_hf_config
from titan_bridge.reference import load_reference
from titan_bridge.sharding.boxes import Box

TOKENS = torch.randint(768, (40,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    """DeepSeek with every projection in blocks; no size but one is a multiple of 128."""
    return make_fp8(tmp_path_factory.mktemp("fp8"), hidden_size=192, intermediate_size=320)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory) -> Path:
    return make_mxfp4(tmp_path_factory.mktemp("mxfp4"), hidden_size=96, intermediate_size=64)


@pytest.fixture(params=[1 << 20, 5000])
def piece(request, monkeypatch) -> None:
    monkeypatch.setattr(quantized, "_PIECE", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_what_torchs_reader_gives(fp8, piece, dtype):
    ours = read(fp8, dtype)
    with open_checkpoint(fp8) as checkpoint:
        assert not any(name.endswith("_scale_inv") for name in ours)
        packed = [name for name in ours if f"{name}_scale_inv" in load_file(fp8 / "model-1.safetensors")]
        assert {checkpoint.tensor(name).dtype for name in packed} == {torch.bfloat16}
    assert len(packed) > 20
    theirs = {name: torch.zeros_like(ours[name]) for name in packed}
    reader = QuantizedHuggingFaceStorageReader(str(fp8), target_dtype=dtype)
    dcp.load(theirs, storage_reader=reader, no_dist=True)
    for name in packed:
        assert torch.equal(ours[name], theirs[name]), name


def test_fp8_is_what_transformers_gives_where_it_can(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 384, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, generator=generator)
    folder = write(
        tmp_path / "a", {"a.weight": weight, "a.weight_scale_inv": scales}, {"dtype": "bfloat16"}, FP8
    )
    for dtype in (torch.float32, torch.bfloat16):
        expected = Fp8Dequantize(None)._dequantize_one(weight, scales, dtype)
        assert torch.equal(read(folder, dtype)["a.weight"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_what_transformers_gives(mxfp4, piece, dtype):
    ours, held = read(mxfp4, dtype), load_file(mxfp4 / "model-1.safetensors")
    packed = [name for name in ours if f"{name}_blocks" in held]
    assert len(packed) == 4
    for name in packed:
        expected = convert_moe_packed_tensors(held[f"{name}_blocks"], held[f"{name}_scales"], dtype=dtype)
        assert torch.equal(ours[name], expected), name


def test_every_byte_and_every_exponent_of_mxfp4(tmp_path):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 256, 1, 1).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).repeat(1, 1, 16).contiguous()
    folder = write(tmp_path / "a", {"a_blocks": blocks, "a_scales": scales}, {}, MXFP4)
    expected = convert_moe_packed_tensors(blocks, scales)
    ours = read(folder, torch.bfloat16)["a"]
    assert torch.equal(ours.view(torch.int16), expected.view(torch.int16))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_box_is_a_slice_of_the_whole(fp8, mxfp4, data):
    folder, name = data.draw(
        st.sampled_from(
            [
                (fp8, "model.layers.0.mlp.up_proj.weight"),
                (fp8, "model.layers.1.self_attn.kv_b_proj.weight"),
                (mxfp4, "model.layers.1.mlp.experts.gate_up_proj"),
            ]
        )
    )
    with open_checkpoint(folder) as checkpoint:
        whole = checkpoint.read(name)
        start = [data.draw(st.integers(0, size - 1)) for size in whole.shape]
        stop = [data.draw(st.integers(a + 1, size)) for a, size in zip(start, whole.shape, strict=True)]
        box = Box(start=tuple(start), stop=tuple(stop))
        out = torch.empty(box.shape, dtype=whole.dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantized, "_PIECE", data.draw(st.sampled_from([1 << 20, 100])))
            checkpoint.read_into(name, box, out)
    assert torch.equal(out, whole[box.slices])


def test_only_the_blocks_of_a_box_are_read(fp8, mxfp4):
    for folder, name, box, most in (
        (fp8, "model.layers.0.mlp.up_proj.weight", Box(start=(130, 0), stop=(150, 10)), 20 * 10 + 4),
        (mxfp4, "model.layers.0.mlp.experts.down_proj", Box(start=(1, 40, 3), stop=(2, 50, 5)), 2 * 17),
    ):
        with open_checkpoint(folder) as checkpoint:
            checkpoint.read_into(name, box, torch.empty(box.shape))
            assert checkpoint.bytes_read == most


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_conversions_and_the_reference_are_those_of_the_full_weights(kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    config = load_hf_config(source)
    del config["quantization_config"]
    values = read(source, torch.float32)
    with open_checkpoint(source) as checkpoint:
        values = {name: value.to(checkpoint.tensor(name).dtype) for name, value in values.items()}
    full = write(tmp_path / "full", values, config, None)
    for to in ("dcp", "hf"):
        for name, path in (("full", full), ("quantized", source)):
            prepare(Options(source=path, target=tmp_path / f"{name}-{to}", to=to)).run()
        assert_equal(tmp_path / f"full-{to}", tmp_path / f"quantized-{to}")
        assert "quantization_config" not in load_hf_config(tmp_path / f"quantized-{to}")
    back = tmp_path / "back"
    prepare(Options(source=tmp_path / "quantized-dcp", target=back, to="hf", config=source)).run()
    assert load_hf_config(back).get("quantization_config") is None
    held = read(back, torch.float32)
    assert held.keys() == values.keys()
    assert all(torch.equal(held[name], value.float()) for name, value in values.items())
    exact = multiplied_out(source, tmp_path / "exact")
    assert torch.equal(load_reference(source).logprobs(TOKENS), load_reference(exact).logprobs(TOKENS))


@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_the_config_that_is_in_use_says_what_is_quantized(fp8, tmp_path, to):
    bare = tmp_path / "bare"
    shutil.copytree(fp8, bare)
    (bare / "config.json").unlink()
    prepare(Options(source=fp8, target=tmp_path / "expected", to=to)).run()
    prepare(Options(source=bare, target=tmp_path / "out", to=to, config=fp8)).run()
    assert_equal(tmp_path / "out", tmp_path / "expected")
    sides = open_sides([str(bare), str(fp8)], config=str(fp8), common=True)
    assert dict(fingerprints(sides[0])) == dict(fingerprints(sides[1]))
    with pytest.raises(BridgeError, match=r"--dtype: .*quantized"):
        prepare(Options(source=bare, target=tmp_path / "x", to="hf", dtype=torch.float32))
    with pytest.raises(BridgeError, match=r"--merge-lora: .*quantized"):
        prepare(Options(source=bare, target=tmp_path / "x", to="hf", merge_lora=tmp_path))
    for method in ("awq", "gptq"):
        config = load_hf_config(fp8) | {"quantization_config": {"quant_method": method}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(BridgeError, match=f"--config .*quant_method='{method}'.* is not supported"):
            prepare(Options(source=bare, target=tmp_path / "x", to=to, config=tmp_path))


W8, S8 = torch.zeros(256, 200).to(torch.float8_e4m3fn), torch.ones(2, 2)
BLOCKS, SCALES = (torch.zeros(shape, dtype=torch.uint8) for shape in ((1, 2, 3, 8), (1, 2, 3)))


@pytest.mark.parametrize(
    ("tensors", "quantization", "message"),
    [
        (
            {"a": W8},
            {"quant_method": "awq"},
            r"quant_method='awq' in config\.json is not supported; allowed: 'fp8', '",
        ),
        ({"a": W8}, FP8 | {"fmt": "e5m2"}, r"fmt='e5m2' in config\.json is not supported; allowed: 'e4m3'"),
        ({"a": W8}, FP8, "a has dtype torch.float8_e4m3fn and no scales"),
        ({"a_scale_inv": S8}, FP8, "a_scale_inv has no a$"),
        (
            {"a": W8, "a_scale_inv": S8[:1].clone()},
            FP8,
            r"\(1, 2\); fp8 needs float8_e4m3fn and scales of .*\(2, 2\)",
        ),
        ({"a": torch.zeros(256, 200), "a_scale_inv": S8}, FP8, "fp8 needs float8_e4m3fn"),
        ({"a": W8, "a_scale_inv": S8.to(torch.uint8)}, FP8, "scales in float32 or bfloat16"),
        ({"a_scales": SCALES}, MXFP4, "a_scales has no a_blocks"),
        ({"a_blocks": BLOCKS}, MXFP4, "a_blocks has dtype torch.uint8 and no scales"),
        ({"a_blocks": BLOCKS, "a_scales": SCALES}, MXFP4, r"values of shape \(E, R, G, 16\)"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, tensors, quantization, message):
    folder = write(tmp_path / "a", tensors, {"dtype": "bfloat16"}, quantization)
    with pytest.raises(BridgeError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
