"""What `titan-bridge serve` passes on to vLLM, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from importlib import metadata
from pathlib import Path

import pytest

from titan_bridge import cli, cpu
from titan_bridge.ports import free_port
from titan_bridge.testing import make_checkpoint, make_run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", tokenizer=False))


def test_a_busy_port_is_refused(model, busy_port, capsys):
    assert cli.main(["serve", model, "--port", str(busy_port)]) == 2
    error = capsys.readouterr().err
    assert f"port {busy_port} on 127.0.0.1 cannot be used" in error
    assert error.count("\n") == 1


def test_serve_passes_every_option_on(model, monkeypatch, capsys):
    monkeypatch.setenv(cpu.BIND, "0|0|0|0")
    arguments = [
        "serve", model, "--tp", "2", "--dp", "2", "--port", "18123", "--dtype", "float32", "--max-model-len", "64",
        "--set", "vllm.max_num_seqs=4", "--enforce-eager", "--seed=7", "--dry-run", "--", "--uvicorn-log-level", "info",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    words = shlex.split(printed)
    command = words[words.index("serve") + 1 :]
    assert command[0] == model
    text = " ".join(command) + " "
    for option in (
        "--model-impl torchtitan", "--tensor-parallel-size 2", "--data-parallel-size 2", "--dtype float32",
        "--max-model-len 64", "--max-num-seqs 4", "--port 18123", "--host 127.0.0.1", "--enforce-eager", "--seed=7",
        "--uvicorn-log-level info",
    ):  # fmt: skip
        assert f"{option} " in text
    assert cpu.BIND not in printed  # the user's stays


def words_after_serve(capsys, *arguments: str) -> list[str]:
    assert cli.main(["serve", *arguments, "--port", "18123", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    return words[words.index("serve") + 1 :]


def test_lists_tables_and_dashes_of_the_file_reach_vllm(model, tmp_path, capsys):
    file = tmp_path / "a.toml"
    file.write_text(
        f'model = "{model}"\n[vllm]\nserved-model-name = ["a", "b"]\nmax-num-seqs = 4\n'
        'cudagraph_capture_sizes = [1, 2]\n[vllm.additional_config.titan]\nmla = "latent"\n'
    )
    words = words_after_serve(capsys, str(file), "--set", "vllm.max-num-seqs=8")
    for option in (
        ["--served-model-name", "a", "b"],
        ["--cudagraph-capture-sizes", "1", "2"],
        ["--max-num-seqs", "8"],
    ):
        at = words.index(option[0])
        assert words[at : at + len(option)] == option
        assert words.count(option[0]) == 1
    words = words_after_serve(capsys, str(file), "--additional-config.other", "1")
    given = json.loads(words[words.index("--additional-config") + 1])
    assert given == {"titan": {"mla": "latent"}, "other": 1}
    file.write_text(f'model = "{model}"\n[vllm]\nmax-num-seqs = 4\nmax_num_seqs = 5\n')
    assert cli.main(["serve", str(file), "--dry-run"]) == 2
    assert "vllm.max_num_seqs is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "step"), [("", 2), ("/checkpoint", 2), ("/checkpoint/step-1", 1)])
def test_serve_takes_a_training_run_under_the_name_that_was_typed(form, step, model, tmp_path, capsys):
    out = make_run(tmp_path / "out", Path(model), Path(model))
    assert cli.main(["serve", f"{out}{form}", "--port", "18123", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    options = words[words.index("serve") + 1 :]
    assert options[0] == str(out / "checkpoint")
    assert options[options.index("--served-model-name") + 1] == f"{out}{form}"
    assert json.loads(options[options.index("--additional-config") + 1]) == {"titan": {"step": step}}


def test_models_of_the_hub_come_from_its_cache(model, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "models--some--model"
    snapshot = cache / "snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(model, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cli.main(["serve", "some/model", "--port", "18123", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[words.index("serve") + 1] == str(snapshot)
    assert words[words.index("--served-model-name") + 1] == "some/model"
    assert cli.main(["serve", "some/other", "--dry-run"]) == 2
    captured = capsys.readouterr().err
    assert "some/other does not exist; give the directory of a model" in captured
    assert "not in the cache of Hugging Face models, and HF_HUB_OFFLINE is set" in captured
    assert captured.count("\n") == 1


def test_a_file_of_the_repository_says_what_makes_its_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).parents[2] / "configs/infer/llama3_tp2.toml"
    assert cli.main(["serve", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"titan-bridge: out/demo/llama3_fsdp2 does not exist; {file} names it")
    assert (
        f"the working directory {tmp_path}; in the repository's root `bash scripts/demo.sh` makes it" in error
    )


PASSED = {
    "as --tp": (["--tensor-parallel-size", "2"], ["--tensor-parallel-size 2"]),
    "as --tp, short": (["-tp", "2"], ["--tensor-parallel-size 2"]),
    "as --dp": (["--data-parallel-size=2"], ["--data-parallel-size 2"]),
    "model_impl": (["--model-impl", "vllm"], ["--model-impl vllm"]),
    "json": (["--compilation-config", '{"mode": 0}'], ["--compilation-config '{\"mode\": 0}'"]),
    "dotted": (["-O0", "-cc.mode", "0"], ["-O0 -cc.mode 0"]),
    "ours beside theirs": (
        ["--dp", "2", "--dense", "shard", "--additional-config", '{"other": 1}'],
        ["""--additional-config '{"other": 1, "titan": {"dense": "shard"}}'"""],
    ),
    "longer": (
        ["--hf-overrides", '{"max_position_embeddings": 8192}', "--max-model-len", "4096"],
        ["""--hf-overrides '{"max_position_embeddings": 8192}'""", "--max-model-len 4096"],
    ),
}


@pytest.mark.parametrize("case", PASSED)
def test_an_option_of_vllms_is_the_flag_that_says_the_same(case, model, capsys):
    arguments, expected = PASSED[case]
    assert cli.main(["serve", model, "--port", str(free_port()), "--dry-run", *arguments]) == 0
    command = capsys.readouterr().out
    for text in expected:
        assert text in command
    names = [word.partition("=")[0] for word in shlex.split(command) if word.startswith("-")]
    assert len(names) == len(set(names)), command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--", "--tensor-parallel-size", "2"], "--tensor-parallel-size is set by parallel.tp; write it there"),
        (["--tp", "2", "--enable-expert-parallel"], "ep=2, but "),
        (["--additional-config", '{"titan": {"ep": 2}}'], "vllm.additional_config.titan.ep is set by parallel.ep"),
        (["--max-model-len", "9000", "--hf-overrides", '{"max_position_embeddings": 8192}'], "up to 8192"),
        (["--hf-overrides", '{"attention_bias": true}'], "attention_bias=true"),
        (["--tp", "2", "--nnodes", "2", "--node-rank", "1"], "serves nothing itself; add --headless"),
    ],
)  # fmt: skip
def test_options_of_vllms_that_contradict_ours_are_refused(arguments, expected, model, capsys):
    assert cli.main(["serve", model, "--port", str(free_port()), "--dry-run", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_a_node_without_a_server_needs_no_port_and_binds_its_own_workers(
    model, busy_port, capsys, monkeypatch
):
    monkeypatch.delenv(cpu.BIND, raising=False)
    nodes = ["--tp", "4", "--nnodes", "2", "--node-rank", "1", "--headless"]
    assert cli.main(["serve", model, "--port", str(busy_port), "--dry-run", *nodes]) == 0
    words = shlex.split(capsys.readouterr().out)
    variables = dict(word.partition("=")[::2] for word in words)
    assert not {"--host", "--port"} & set(words)
    assert variables[cpu.WORKERS] == "2"
    assert variables.get(cpu.BIND) == cpu.bind(2, cpu.cores())


def test_serve_binds_threads_where_the_user_did_not(model, monkeypatch, capsys):
    for name in [name for name in os.environ if name.startswith("VLLM_CPU")]:
        monkeypatch.delenv(name)
    assert cli.main(["serve", model, "--dp", "16", "--tp", "4", "--port", str(free_port()), "--dry-run"]) == 0
    bind = next(w for w in shlex.split(capsys.readouterr().out) if w.startswith(f"{cpu.BIND}="))
    assert len(bind.split("|")) == 64


@pytest.mark.parametrize("given", [None, "theirs,other"])
def test_the_route_of_the_sharding_shuts_no_plugin_out(given, model, monkeypatch, capsys):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if given:
        monkeypatch.setenv("VLLM_PLUGINS", given)
    assert cli.main(["serve", model, "--sharding-spec", "--port", str(free_port()), "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    (named,) = (word.partition("=")[2].split(",") for word in words if word.startswith("VLLM_PLUGINS="))
    installed = {point.name for point in metadata.entry_points(group="vllm.general_plugins")}
    assert set(named) == ({"theirs", "other", "titan_bridge"} if given else installed)
