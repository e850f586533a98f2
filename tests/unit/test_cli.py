"""The command line: help, exit codes, and one line for a user's mistake."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from titan_bridge import cli
from titan_bridge.engine.cpu import forking
from titan_bridge.errors import BridgeError
from titan_bridge.testing import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", tokenizer=False))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama3")
    return str(make_checkpoint(path, "llama3", head_dim=16, num_hidden_layers=1, tokenizer=False))


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


USAGE = {
    "inspect m --tp x": "--tp x is no integer",
    "parity m --tolerance x": "--tolerance x is no number",
    "inspect m --bogus 3": "unrecognized options: --bogus, 3",
    "plan": "missing: SRC, DST",
    "reshard a b": "missing: --to {hf,dcp,peft}",
    "reshard a b --to zip": "invalid choice 'zip' for argument '--to'. Expected one of ('hf', 'dcp', 'peft')",
    "generate m --tp": "missing value for argument '--tensor-parallel-size/-tp/--tp'. Expected 1 values",
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro's boxes depend on it
@pytest.mark.parametrize("line", USAGE)
def test_a_usage_error_is_one_line(line, encoding, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    command, *rest = line.split()
    assert cli.main([command, *rest]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"titan-bridge: {USAGE[line]}; see titan-bridge {command} --help\n"
    assert captured.out == ""


MISTAKES = {
    "parity m --tolerance nan": "--tolerance nan; give a finite number of at least 0",
    "parity m --tolerance -1": "--tolerance -1.0; give",
    "parity m --tolerance inf": "--tolerance inf; give",
    "diff a b --show -1": "--show -1; give at least 0",
    "plan {model} tp=2 --pairs -1": "--pairs -1; give at least 0",
    "plan {model} tp=2 --colocated": "--colocated is for two sides of ranks",
    "plan nosuch tp=2": "SRC nosuch does not exist; give a checkpoint, or a layout file",
    "fingerprint {model} --names-b a.{{}}": "--names-b is of B",
    "generate m --attention_dp --max-tokens 2": "m does not exist",
    "generate m -ep --ep 2": "--enable-expert-parallel (-ep) and --ep 2 both say ep",
    "generate m --set vllm.additional_config=3": "vllm.additional_config is 3; it must be a table",
    "generate m --dense shard --set vllm.additional_config.titan=x": "vllm.additional_config.titan is 'x'; it must",
    "generate m --compilation-config 3 --compilation-config.mode 0": "--compilation-config has the value 3 already",
    "serve {model} --nnodes abc": "--nnodes abc; give an integer of at least 1",
    "serve {model} --nnodes 0": "--nnodes 0; give an integer of at least 1",
    "serve {model} --node-rank x --dry-run": "--node-rank x; give an integer of at least 0",
    "inspect {model} --why norm --json": "--why prints text on all ranks; leave --json out",
    "inspect {model} --layers --json --rank 0": "--layers shows all ranks; leave --rank out",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_what_does_not_hold_or_go_together_is_refused(line, model, capsys):
    assert cli.main(line.format(model=model).split()) == 2
    captured = capsys.readouterr()
    assert MISTAKES[line] in captured.err
    assert captured.err.count("\n") == 1


BAD_MODELS = {
    "no directory": (["{folder}/none"], "{folder}/none does not exist; give the directory of a model"),
    "no config.json": (
        ["{folder}"],
        "has no config.json (found: nothing); give a model in Hugging Face format",
    ),
    "no experts": (["{model}", "--tp", "2", "--ep", "2"], "has no experts; leave ep at 1"),
    "heads": (["{model}", "--tp", "3"], "tp=3 does not divide n_heads=8, intermediate_size=256; "),
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


def test_what_a_command_imports_is_not_looked_through_for_garbage():
    code = (
        "import gc; from titan_bridge.cli import imports\n"
        "with imports():\n    import decimal\n    assert not gc.isenabled()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 1000\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    before = gc.get_freeze_count()
    with pytest.raises(BridgeError), cli.imports():  # here torch is there, by somebody else
        raise BridgeError("no")
    assert gc.isenabled()
    assert gc.get_freeze_count() == before
