"""`titan-bridge inspect`: the layout from config.json alone, in numbers that add up, at any size."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from titan_bridge import cli
from titan_bridge.mesh import Sizes
from titan_bridge.model_layout import layout
from titan_bridge.models import load_hf_config
from titan_bridge.sharding import Layout
from titan_bridge.testing import make_checkpoint

TERA = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "num_experts": 384,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "dtype": "bfloat16",
}
"""As large as Kimi K2: 1.04 T parameters."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with config.json and nothing else."""
    folder = make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe", vocab_size=777, tokenizer=False)
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    return folder


def run(capsys, *arguments: object) -> str:
    assert cli.main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_json_is_the_layout(model, capsys):
    told = json.loads(run(capsys, model, "--dp", 2, "--tp", 2, "--ep", 4, "--dense", "shard", "--json"))
    expected = layout(load_hf_config(model), Sizes(dp=2, tp=2, ep=4), "shard")
    assert Layout.from_json(told) == expected
    assert told["meshes"]["sparse"] == {
        "axes": ["dp_replicate", "efsdp", "ep"],
        "shape": [1, 1, 4],
        "ranks": [[[0, 1, 2, 3]]],
    }
    assert told["params"]["tok_embeddings.weight"] == {
        "mesh": "dense",
        "placements": ["R", "SS(0,2)", "S(0)"],
        "shape": [778, 128],  # 777 rows and one of padding
        "dtype": "float32",
    }
    only_dense = json.loads(run(capsys, model, "--tp", 2, "--json", "--dtype", "bfloat16"))
    assert list(only_dense["meshes"]) == ["dense"]
    assert {param["dtype"] for param in only_dense["params"].values()} == {"bfloat16"}


def test_rows_of_a_rank_add_up(model, capsys):
    flags = ("--dp", 2, "--tp", 2, "--ep", 2, "--dense", "shard", "--json")
    told = [json.loads(run(capsys, model, *flags, "--rank", rank)) for rank in range(4)]
    params = layout(load_hf_config(model), Sizes(dp=2, tp=2, ep=2), "shard").params
    for rank, answer in enumerate(told):
        assert [row["name"] for row in answer["params"]] == list(params)
        assert all(row["rank_bytes"] == 4 * math.prod(row["local_shape"]) for row in answer["params"])
        assert answer["rank_bytes"] == sum(row["rank_bytes"] for row in answer["params"])
        assert answer["rank"] == rank
    held = [answer["rank_bytes"] for answer in told]
    assert told[0]["all_ranks_bytes"] == sum(held)
    assert told[0]["most_loaded"]["bytes"] == max(held)
    assert told[0]["least_loaded"]["bytes"] == min(held)
    assert told[0]["global_bytes"] == 4 * sum(math.prod(param.shape) for param in params.values())


def test_table_says_which_rank_and_where(model, capsys):
    printed = run(capsys, model, "--dp", 2, "--tp", 2, "--ep", 4, "--rank", 3)
    assert "local shape, rank 3" in printed
    row = next(line for line in printed.splitlines() if "inner_experts.w1_EFD" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "layers.*.moe.routed_experts.inner_experts.w1_EFD  x2", "8 x 64 x 128", "sparse", "R, R, S(0)", "2 x 64 x 128",
        "131.07 kB",
    ]  # fmt: skip
    every = run(capsys, model, "--all", "--dtype", "bfloat16")
    assert "layers.1.attention.wo.weight" in every
    assert " tensors of float32; " in printed
    assert " tensors of bfloat16; " in every


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--rank", "4", "--tp", "4"], "rank 4 is outside the world of 4; allowed: 0 to 3"),
        (["--tp", "3"], "tp=3 does not divide n_heads=8"),
        (["--dp", "4", "--ep", "16"], "ep=16 does not divide"),
        (["--picture", "out.jpeg"], "must end in one of .svg, .png, .pdf"),
    ],
)
def test_mistakes_are_one_line(model, flags, expected, capsys):
    assert cli.main(["inspect", str(model), *flags]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_ep_of_the_command_line_and_overrides_of_the_config_count(model, tmp_path, capsys):
    file = tmp_path / "a.toml"
    file.write_text(f'model = "{model}"\n[parallel]\ntp = 4\nep = 2\n')
    assert Layout.from_json(json.loads(run(capsys, file, "--json"))) != (
        whole := Layout.from_json(json.loads(run(capsys, file, "-ep", "--json")))
    )
    assert whole == Layout.from_json(json.loads(run(capsys, model, "--tp", 4, "--ep", 4, "--json")))
    override = ["--set", 'vllm.hf_overrides={"num_hidden_layers" = 1}']
    names = json.loads(run(capsys, model, *override, "--json"))["params"]
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0"}


def test_the_note_on_the_dtype_says_what_config_json_says(model, tmp_path, capsys):
    stated = json.loads((model / "config.json").read_text())
    for dtype, note in (("float32", "as config.json says"), (None, "since config.json states no dtype")):
        (tmp_path / "config.json").write_text(json.dumps(stated | {"dtype": dtype, "torch_dtype": None}))
        assert cli.main(["inspect", str(tmp_path)]) == 0
        assert f"shown in float32, {note}" in capsys.readouterr().err


def test_pictures(model, tmp_path, capsys):
    svg, png = tmp_path / "a.svg", tmp_path / "a.png"
    run(capsys, model, "--dp", 2, "--tp", 2, "--ep", 4, "--picture", svg, "--picture", png)
    assert len(list(ET.parse(svg).iter())) > 100
    assert f"<!-- {model.name} (Qwen3MoeForCausalLM): dp=2 tp=2 ep=4, dense weights " in svg.read_text()
    with Image.open(png) as image:
        assert len(image.convert("L").getcolors()) > 10


def test_a_trillion_parameters_on_1024_ranks_in_10_seconds_and_2_gb(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TERA))
    run = (
        "import shutil, sys; from titan_bridge import cli; code = cli.main(sys.argv[2:]); "
        "shutil.copyfile('/proc/self/status', sys.argv[1]); sys.exit(code)"
    )
    command = [
        sys.executable,
        "-c",
        run,
        str(tmp_path / "peak"),
        "inspect",
        str(tmp_path),
        "--dense",
        "shard",
        "--json",
    ]
    sizes = ["--dp", "128", "--tp", "8", "--ep", "128", "--rank", "1023"]
    with (tmp_path / "told.json").open("w") as output:
        process = subprocess.Popen([*command, *sizes], stdout=output)
        _, status, used = os.wait4(process.pid, 0)  # of this process, not of the largest so far
    assert status == 0
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", (tmp_path / "peak").read_text())
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["parameters"] == 1_042_174_423_296
    assert told["ranks"] == 1024
    # Processor time, so that a busy machine does not count; one that is slow at new memory is slow at imports, too.
    process = subprocess.Popen([sys.executable, "-c", "import torch"])
    _, _, torch = os.wait4(process.pid, 0)
    slow = max(1, (torch.ru_utime + torch.ru_stime) / 2)
    assert used.ru_utime + used.ru_stime < 10 * slow
    assert int(peak) * 1024 < 2e9  # ru_maxrss begins with what this process had when it forked
