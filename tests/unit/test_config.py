"""TOML for inference: what is accepted, who overrides whom, and what a refusal says."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import subprocess
import typing
from pathlib import Path
from typing import Any

import pytest

from titan_bridge import cli
from titan_bridge.commands.infer import format_vllm_options, parse_vllm_options
from titan_bridge.config.kinds import KINDS
from titan_bridge.config.reader import json_schema, parse_set, resolve
from titan_bridge.config.schema import SCHEMAS, InferConfig
from titan_bridge.config.table import BEGIN, END, key_rows
from titan_bridge.errors import BridgeError
from titan_bridge.testing import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs/infer").glob("*.toml"))
FAMILIES = ("llama3", "qwen3_moe", "qwen3", "deepseek_v3", "gpt_oss")


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "a.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_accepted_and_named_for_their_sizes(path):
    config = resolve(InferConfig, file=path).config
    for axis in ("dp", "tp", "ep"):
        size = getattr(config.parallel, axis)
        assert size == 1 or f"{axis}{size}" in path.stem


def test_there_are_shipped_files():
    assert {name for name in FAMILIES for path in SHIPPED if path.stem.startswith(name)} == set(FAMILIES)


def sizes_of_trained(name: str) -> dict[str, Any]:
    """Model sizes of the file in configs/train/ with that name; none where there is no such file."""
    file = ROOT / f"configs/train/{name}.toml"
    if not file.is_file():
        return {}
    sizes = dataclasses.asdict(resolve(KINDS["train"], file=file).config.model.sizes)
    sizes |= sizes.pop("other")
    return {key: value for key, value in sizes.items() if value is not None}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_describe_and_serve_the_models_that_they_name(path, tmp_path, monkeypatch, capsys):
    """Each file as it is, with a model of the right sizes where it looks for one; no engine is started."""
    monkeypatch.chdir(tmp_path)
    config = resolve(InferConfig, file=path).config
    family = next(name for name in FAMILIES if path.stem.startswith(name))
    model, sizes = tmp_path / config.model, sizes_of_trained(Path(config.model).name)
    if sizes:
        sizes = {"head_dim": sizes.get("qk_rope_head_dim")} | sizes
    make_checkpoint(model, family, tokenizer=False, **sizes)

    assert cli.main(["inspect", str(path), "--json"]) == 0
    layout = json.loads(capsys.readouterr().out)
    parallel = config.parallel
    assert layout["meshes"]["dense"]["shape"] == [1, parallel.dp, parallel.tp]
    if parallel.ep > 1:
        assert layout["meshes"]["sparse"]["shape"][-1] == parallel.ep
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert cli.main(["serve", str(path), "--dry-run", "--port", str(port)]) == 0
    command = capsys.readouterr().out
    assert f"--tensor-parallel-size {parallel.tp} " in command
    for option in config.vllm:
        assert f"--{option.replace('_', '-')}" in command


def test_defaults_then_file_then_set_then_flag(write):
    file = write('model = "m"\ndtype = "float32"\n[parallel]\ntp = 2\nep = 2\n')
    resolved = resolve(
        InferConfig,
        file=file,
        sets=["parallel.dp=2", "dtype=float16", "vllm.seed=3"],
        flags={"dtype": "bfloat16", "max_model_len": None},
    )
    config = resolved.config
    assert (config.dtype, config.parallel.dp, config.parallel.tp) == ("bfloat16", 2, 2)
    assert config.parallel.dense == "replicate"
    origins = {key: origin for key, _, origin in resolved.table()}
    assert origins == origins | {
        "model": file,
        "dtype": "--dtype",
        "parallel.dp": "--set",
        "parallel.tp": file,
        "parallel.dense": "default",
        "max_model_len": "default",
        "vllm.seed": "--set",
    }


def test_nothing_is_silently_dropped_on_the_way_to_vllm(write):
    file = write(
        'model = "m"\nmax_model_len = 64\n[parallel]\ntp = 2\nep = 2\ndense = "shard"\n'
        "[vllm]\nenforce_eager = true\nmax-num-seqs = 4\nadditional_config = {other = 1}\n"
    )
    assert resolve(InferConfig, file=file).config.engine_options() == {
        "model": "m",
        "model_impl": "torchtitan",
        "dtype": "auto",
        "max_model_len": 64,
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "enforce_eager": True,
        "max_num_seqs": 4,
        "additional_config": {"other": 1, "titan": {"dense": "shard"}},
    }


def test_ep_between_none_and_all_becomes_our_option(write):
    config = resolve(InferConfig, file=write('model="m"\nparallel={dp=2,tp=2,ep=2}')).config
    assert config.engine_options()["additional_config"] == {"titan": {"ep": 2}}
    assert config.engine_options()["enable_expert_parallel"] is True


REFUSED = {
    'modle = "m"': "unknown key modle; did you mean model? allowed in the top level: dtype, generate",
    'model = "m"\n[paralel]\ntp = 2': "unknown key paralel; did you mean parallel?",
    'model = "m"\n[parallel]\ntpp = 2': "unknown key parallel.tpp; did you mean parallel.tp? "
    "allowed in [parallel]: attention_dp, attn_tp, dense, dp, ep, pp, tp",
    'model = "m"\n[parallel]\nzzz = 2': "unknown key parallel.zzz; "
    "allowed in [parallel]: attention_dp, attn_tp, dense, dp, ep, pp, tp",
    "model = 1": "model = 1 (int) is not allowed; it must be a string",
    'model = "m"\n[parallel]\ntp = 0': "parallel.tp = 0 (int) is not allowed; it must be greater than or equal to 1",
    'model = "m"\n[parallel]\ntp = "2"': "parallel.tp = '2' (str) is not allowed; it must be an integer",
    'model = "m"\n[parallel]\ntp = true': "parallel.tp = True (bool) is not allowed; it must be an integer",
    'model = "m"\n[parallel]\ntp = 2\nep = 3': "ep=3 does not divide dp*tp=2; allowed with dp=1, tp=2: 1, 2",
    'model = "m"\nparallel = 2': "parallel = 2 (int) is not allowed; it must be a table",
    'model = "m"\ndtype = "fp8"': "it must be 'auto', 'float32', 'bfloat16' or 'float16'",
    'model = "m"\n[generate]\nprompts = "x"': "generate.prompts = 'x' (str) is not allowed; it must be a list",
    'model = "m"\n[generate]\nprompts = []': "it must be a list that is not empty",
    'model = "m"\n[generate]\nprompts = [1]': "generate.prompts.0 = 1 (int) is not allowed; it must be a string",
    'model = "m"\n[generate]\ntop_p = 1.5': "generate.top_p = 1.5 (float)",
    'model = "m"\n[vllm]\ntensor_parallel_size = 2': "vllm.tensor_parallel_size is set by parallel.tp",
    'model = "m"\n[vllm.additional_config.titan]\nep = 2': "vllm.additional_config.titan.ep is set by parallel.ep",
    'model = "m"\n[vllm.additional_config]\ntitan = 1': "vllm.additional_config.titan is 1; it must be a table",
    'model = ""': "model = '' (str) is not allowed; it must be a text that is not empty",
    'model = "m"\n[generate]\ntemperature = inf': "temperature = inf (float) is not allowed; it must be a finite",
    'model = "m"\n[generate]\ntemperature = nan': "temperature = nan (float) is not allowed; it must be a finite",
    "[parallel]\ntp = 1": "the key model is missing; it is required",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text.replace("\n", " "))
def test_refused_with_file_key_and_remedy_in_one_line(write, text):
    file = write(text)
    with pytest.raises(BridgeError) as caught:
        resolve(InferConfig, file=file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert REFUSED[text] in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("command", "file", "message"),
    [
        (
            "parity",
            "configs/train/llama3_fsdp2.toml",
            "is a file for `titan-bridge train`, by its keys data, ",
        ),
        (
            "train",
            "configs/infer/llama3_tp2.toml",
            "is a file for `titan-bridge serve, generate, parity or inspect`",
        ),
    ],
)
def test_a_file_of_the_other_kind_is_called_one(command, file, message, capsys):
    path = ROOT / file
    assert cli.main([command, str(path)]) == 2
    said = capsys.readouterr().err
    assert f"{path} {message}" in said
    assert "allowed here: " in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("folder", ["infer", "train", "elsewhere"])
@pytest.mark.parametrize(
    "path", [path for kind in KINDS for path in sorted((ROOT / "configs" / kind).glob("*.toml"))], ids=str
)
def test_what_a_file_is_depends_on_its_keys_not_on_its_folder(path, folder, tmp_path, capsys):
    (tmp_path / folder).mkdir()
    copied = shutil.copy(path, tmp_path / folder / "a.toml")
    assert cli.main(["config", str(copied), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert ("model.family" in shown) == (path.parent.name == "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 1\nnproc = 2\n[paralel]\ntp = 2", "unknown key paralel; did you mean parallel? allowed in"),
        ('model = "m"\nlr = 1', "unknown key lr; allowed in the top level: dtype"),
        ('[model]\nfamily = "llama3"\n[generate]', "unknown key generate; allowed in the top level: data"),
        ("", "the key model is missing"),
    ],
)  # fmt: skip
def test_a_misspelt_file_is_held_against_the_kind_that_it_is_most_like(text, message, write, capsys):
    assert cli.main(["config", write(text)]) == 2
    assert message in capsys.readouterr().err


SYNTAX = {
    'model = "m"\ndtype = ': ":2:9: ",
    'model = "m\n': ":1:11: ",
    'model = "m"\nmodel = "n"': ":2:12: ",
    "[parallel\n": ":1:10: ",
}


@pytest.mark.parametrize("text", SYNTAX, ids=lambda text: text.replace("\n", " "))
def test_syntax_errors_name_file_line_and_column(write, text):
    file = write(text)
    with pytest.raises(BridgeError) as caught:
        resolve(InferConfig, file=file)
    assert str(caught.value).startswith(f"{file}{SYNTAX[text]}TOML syntax: ")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b'model = "\xff"')
    for name, expected in {
        "none.toml": "does not exist",
        "bytes.toml": "is not UTF-8 text (byte 9)",
        "": "cannot be read: Is a directory",
    }.items():
        with pytest.raises(BridgeError, match=f".*{name}.*") as caught:
            resolve(InferConfig, file=tmp_path / name)
        assert expected in str(caught.value)


def test_a_flag_that_clashes_with_the_file_names_both(write):
    file = write('model = "m"\n[parallel]\ntp = 2\n')
    with pytest.raises(BridgeError) as caught:
        resolve(InferConfig, file=file, flags={"parallel.ep": 3})
    assert str(caught.value).startswith(f"{file}, --ep: ep=3 does not divide")


def test_set_reads_toml_values_and_bare_words():
    for text, value in {
        "a.b=2": 2,
        "a.b=[1, 2]": [1, 2],
        "a.b = true": True,
        'a.b="2"': "2",
        "a.b=out/demo": "out/demo",
        "a.b=x=y": "x=y",
    }.items():
        assert parse_set(text) == ("a.b", value)
    for text in ("a.b", "=2", "a b=2"):
        with pytest.raises(BridgeError, match="is not key=value"):
            parse_set(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo=1", "--set foo: unknown key foo"),
        ("model.a=1", "--set model.a: model is a value, not a table"),
        ("parallel.tp=x", "--set: parallel.tp = 'x' (str) is not allowed; it must be an integer"),
    ],
)
def test_refused_sets_say_that_it_was_a_set(text, message):
    with pytest.raises(BridgeError) as caught:
        resolve(InferConfig, sets=["model=m", text])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_json_schema_has_every_field_with_its_description(kind):
    schema = json_schema(SCHEMAS[kind])
    classes = [SCHEMAS[kind]]
    while classes:
        cls = classes.pop()
        part = schema if cls is SCHEMAS[kind] else schema["$defs"][cls.__name__]
        assert part["additionalProperties"] is False
        assert set(part["properties"]) == {field.name for field in dataclasses.fields(cls)}
        for name, hint in typing.get_type_hints(cls).items():
            assert part["properties"][name]["description"], f"{cls.__name__}.{name} has no docstring"
            if dataclasses.is_dataclass(hint):
                classes.append(hint)


def test_the_readme_has_the_table_of_keys_that_the_command_prints(capsys):
    assert cli.main(["config", "--table"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed.startswith(BEGIN)
    assert printed.endswith(END)
    assert printed in (ROOT / "configs" / "README.md").read_text(), (
        f"put what `titan-bridge config --table` prints between {BEGIN} and {END} in configs/README.md"
    )


SMALLEST = {
    "infer": ["model=m"],
    "train": [
        "model.family=llama3",
        *(f"model.sizes.{key}=4" for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")),
        "data.seed=1",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_exactly_the_keys_that_a_file_may_set_with_their_defaults(kind):
    resolved = resolve(KINDS[kind], sets=SMALLEST[kind]).table()
    rows = {key.strip("`"): (default, meaning) for key, _, default, meaning in key_rows(KINDS[kind])}
    assert rows.keys() == {key for key, _, _ in resolved}
    assert all(meaning for _, meaning in rows.values())
    for key, value, origin in resolved:
        shown = {None: "none", "{}": "empty"}.get(
            value if value is None else str(value), f"`{json.dumps(value)}`"
        )
        if origin == "default":
            assert rows[key][0] == shown, key


def test_json_has_no_infinity(tmp_path, capsys):
    file = tmp_path / "a.toml"
    file.write_text('[model]\nfamily = "llama3"\nflavor = "debugmodel"\n[trainer.training]\nmax_norm = inf\n')
    assert cli.main(["config", str(file), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert printed["trainer.training.max_norm"]["value"] == "inf"


def test_one_file_reads_toml():
    found = subprocess.run(
        [
            "grep",
            "-rlE",
            r"^\s*(import|from) (tomli|tomllib)\b",
            "titan_bridge",
            "parallelize",
            "--include=*.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == ["titan_bridge/config/reader.py"]


def test_vllm_options_from_the_command_line():
    options = parse_vllm_options(
        [
            "--max-num-seqs",
            "4",
            "--enforce-eager",
            "--seed=7",
            "--no-enable-prefix-caching",
            "--x",
            "[1]",
            "--name",
            "a",
        ]
    )
    assert options == {
        "max_num_seqs": 4,
        "enforce_eager": True,
        "seed": 7,
        "enable_prefix_caching": False,
        "x": [1],
        "name": "a",
    }
    assert parse_vllm_options(format_vllm_options(options | {"x": [1, 2]})) == options | {"x": [1, 2]}
    assert parse_vllm_options(
        [
            *("--compilation-config", '{"mode": 0, "x": [true, null]}', "-O0", "--additional-config={}"),
            *("--kv-transfer-config.a.b", "-1", "--kv-transfer-config.a.c=d", "--names", "a", "b", "-n", "2"),
        ]
    ) == {
        "compilation_config": {"mode": 0, "x": [True, None]},
        "optimization_level": 0,
        "additional_config": {},
        "kv_transfer_config": {"a": {"b": -1, "c": "d"}},
        "names": ["a", "b"],
        "nnodes": 2,
    }
    lists = {"served_model_name": ["a", "b"], "hf_overrides": {"a": [1]}, "allowed_origins": ["x"]}
    assert format_vllm_options(lists) == [
        "--served-model-name",
        "a",
        "b",
        "--hf-overrides",
        '{"a": [1]}',
        "--allowed-origins",
        '["x"]',
    ]
    with pytest.raises(BridgeError, match="'4' is not an option"):
        parse_vllm_options(["4"])
