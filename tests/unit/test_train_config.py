"""TOML for training: what TorchTitan gets, where each value came from, and what a refusal says."""

from __future__ import annotations

import dataclasses
import json
import logging
import typing
from pathlib import Path

import pytest
import torch
from torchtitan.components.optimizer import default_adamw
from torchtitan.trainer import Trainer

from titan_bridge import cli
from titan_bridge.config import reader
from titan_bridge.config.kinds import KINDS, kind_of
from titan_bridge.config.train_schema import TrainConfig
from titan_bridge.errors import BridgeError
from titan_bridge.models import family_for
from titan_bridge.train import cpu, overrides
from titan_bridge.train.build import Job, build, on_cpu

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs/train").glob("*.toml"))

LLAMA = """
[model]
family = "llama3"
[model.sizes]
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
"""


@pytest.fixture(autouse=True)
def _log_as_before():
    """The command silences warnings for its whole process."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def job(tmp_path):
    """Build from text and `--set`s; the TOML file is tmp_path / a.toml."""

    def make(text: str = LLAMA, *sets: str, **flags) -> Job:
        file = tmp_path / "a.toml"
        file.write_text(text)
        resolved = reader.resolve(TrainConfig, file=file, sets=sets, flags=flags)
        return build(resolved.config, resolved.origin, name="a")

    return make


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_make_models_of_about_5_m_parameters_in_the_layout_of_their_names(path):
    resolved = reader.resolve(TrainConfig, file=path)
    made = build(resolved.config, resolved.origin, name=path.stem)
    with torch.device("meta"):
        model = made.trainer.model_spec.model.build()
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 6e6
    sizes = made.sizes
    assert made.nproc == sizes.world
    name = path.stem
    assert (sizes.tp > 1) == ("tp" in name)
    assert (sizes.ep > 1) == ("ep2" in name)
    assert (sizes.dp_replicate > 1) == ("hsdp" in name)
    assert ("Moe" in made.hf_config["architectures"][0]) == ("moe" in name)
    assert kind_of(path) == "train"


def test_the_shipped_files_are_the_four_layouts():
    assert {path.stem for path in SHIPPED} >= {
        "llama3_fsdp2",
        "llama3_fsdp2_tp2",
        "llama3_hsdp2x2",
        "qwen3_moe_ep2",
    }


def test_defaults_then_file_then_set_with_their_origins(job, tmp_path):
    made = job(
        "lr = 0.5\n" + LLAMA + "[trainer]\ntraining = {steps = 7, seq_len = 64}\n",
        "trainer.training.steps=9",
        "parallel.dp=2",
        out=str(tmp_path / "o"),
    )
    rows = {key: (value, origin) for key, value, origin in made.table()}
    file = str(tmp_path / "a.toml")
    expected = {
        "trainer.training.steps": (9, "--set"),
        "trainer.training.seq_len": (64, file),
        "trainer.training.local_batch_size": (8, "default"),
        "trainer.checkpoint.keep_latest_k": (2, "titan-bridge"),
        "trainer.parallelism.data_parallel_shard_degree": (2, "parallel.dp"),
        "trainer.optimizer.param_groups.0.optimizer_kwargs.lr": (0.5, "lr"),
        "trainer.dump_folder": (str(tmp_path / "o"), "out"),
        "out": (str(tmp_path / "o"), "--out"),
        "lr": (0.5, file),
        "nproc": (2, "default"),
    }
    if on_cpu():
        expected["trainer.training.disable_cuda_graphs"] = (True, "cpu")
    assert {key: rows[key] for key in expected} == expected
    assert made.trainer.training.steps == 9


def test_every_value_of_torchtitan_is_shown(job):
    made = job()
    shown = {key for key, _, _ in made.table()}
    for section in dataclasses.fields(Trainer.Config):
        value = getattr(made.trainer, section.name)
        empty = dataclasses.is_dataclass(value) and not dataclasses.fields(value)
        if section.name != "model_spec" and not empty:
            assert any(key.startswith(f"trainer.{section.name}") for key in shown), section.name


def test_what_is_trained_is_what_is_served(job):
    """The config.json of a run makes the model of the run again."""
    made = job(LLAMA, "data.tokenizer=bytes", "model.sizes.tie_word_embeddings=true")
    assert made.hf_config["vocab_size"] == 320
    assert made.hf_config["max_position_embeddings"] == 2048
    served = family_for(made.hf_config).model_config(made.hf_config)
    with torch.device("meta"):
        ours, theirs = made.trainer.model_spec.model.build(), served.build()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {
        n: t.shape for n, t in theirs.state_dict().items()
    }


@pytest.mark.parametrize(("family", "flavor"), [("llama3", "debugmodel"), ("qwen3", "debugmodel_moe")])
def test_a_flavor_is_torchtitans_own(job, family, flavor):
    made = job(f'[model]\nfamily = "{family}"\nflavor = "{flavor}"\n')
    assert made.trainer.model_spec.flavor == flavor
    assert made.hf_config["hidden_size"] == 256
    assert made.expert_bias == (family == "qwen3")


def test_a_function_keeps_its_own_data_unless_there_is_data(job):
    text = '[model]\nconfig = "torchtitan.models.llama3.config_registry:llama3_debugmodel"\n'
    own = job(text, "trainer.training.steps=3", "trainer.dataloader.dataset=c4")
    assert own.trainer.dataloader.dataset == "c4"
    assert own.trainer.training.steps == 3
    assert own.config.data is None
    rows = {key: origin for key, _, origin in own.table()}
    assert (
        rows["trainer.lr_scheduler.warmup_steps"]
        == "torchtitan.models.llama3.config_registry:llama3_debugmodel"
    )
    ours = job(text + "[data]\ntokenizer = 'bytes'\n")
    assert ours.trainer.dataloader.dataset == "titan_bridge_text"


def test_processes_without_dp_are_shared_out(job):
    assert job(LLAMA, "parallel.tp=2", nproc=4).sizes.dp == 2
    assert job(LLAMA, "parallel.dp=2", "parallel.dp_replicate=2").nproc == 4


REFUSED = {
    (
        "",
        "model.family=lama3",
    ): "--set: model.family = 'lama3' is unknown; did you mean llama3? allowed: deepseek_v3, gpt_oss, llama3, qwen3",
    ("", "model.flavor=8B"): "a.toml, --set: model.flavor and [model.sizes]: both given; give exactly one",
    ("", "model.flavr=8B"): "--set model.flavr: unknown key model.flavr; did you mean model.flavor?",
    ("", "model.config=a"): "model.config is given together with family",
    (
        "",
        "parallel.tp=3",
    ): "--set: tp=3 does not divide n_heads=4, n_kv_heads=2, intermediate_size=128; allowed for this",
    ("", "parallel.ep=2"): "--set: ep=2 does not divide dp*tp=1; allowed with dp=1, tp=1: 1",
    (
        "",
        "parallel.dp=0",
    ): "--set: parallel.dp = 0 (int) is not allowed; it must be greater than or equal to 1",
    (
        "nproc = 3\n",
        "parallel.dp=2",
    ): "a.toml: nproc=3 is not the product of the degrees dp=2 = 2; set nproc=2",
    (
        "",
        "trainer.parallelism.pipeline_parallel_degree=2",
    ): "--set: trainer.parallelism.pipeline_parallel_degree = 2 is not supported by titan-bridge train; allowed: 1",
    (
        "",
        "trainer.parallelism.context_parallel_degree=2",
    ): "--set: trainer.parallelism.context_parallel_degree = 2 is not supported by titan-bridge train; allowed: 1",
    (
        "",
        "trainer.activation_checkpoint=[1]",
    ): "trainer.activation_checkpoint = [1] (list) is not allowed; it must be one",
    ("", "lr=inf"): "--set: lr = inf (float) is not allowed; it must be a finite number",
    ("", "out="): "--set: out = '' (str) is not allowed; it must be a text that is not empty",
    (
        "",
        "trainer.training.max_norm=nan",
    ): "trainer.training.max_norm = nan (float) is not allowed; it must be a finite number",
    (
        "",
        "trainer.lr_scheduler.decay_ratio=inf",
    ): "decay_ratio = inf (float) is not allowed; it must be a finite",
    ("", "lr=0"): "--set: lr = 0 (int) is not allowed; it must be greater than 0",
    ("", "trainer.training.stepz=1"): "--set: unknown key trainer.training.stepz; did you mean "
    "trainer.training.steps? allowed in [trainer.training]: disable_cuda_graphs",
    ("", "trainer.traning.steps=1"): "unknown key trainer.traning; did you mean trainer.training?",
    (
        "",
        "trainer.training.steps=0",
    ): "trainer.training.steps = 0 (int) is not allowed; it must be at least 1",
    (
        "",
        "trainer.training.steps=1.5",
    ): "trainer.training.steps = 1.5 (float) is not allowed; it must be an integer",
    (
        "",
        "trainer.training.steps=true",
    ): "trainer.training.steps = True (bool) is not allowed; it must be an integer",
    ("", "trainer.training.dtype=fp8"): "it must be 'bfloat16' or 'float32'",
    ("", "trainer.training=1"): "trainer.training = 1 (int) is not allowed; it must be a table",
    ("", "trainer.checkpoint.keep_latest_k=1"): "[trainer.checkpoint]: We need to maintain at least 2",
    ("", "trainer.dump_folder=x"): "trainer.dump_folder is set by out; write it there",
    ("", "trainer.dataloader.dataset=c4"): "trainer.dataloader.dataset is set by data.path; write it there",
    ("", "trainer.parallelism.tensor_parallel_degree=2"): "is set by parallel.tp; write it there",
    ("", "trainer.activation_checkpoint=some"): "it must be one of none, selective, full, memory_budget",
    ("", "trainer.training.seq_len=4096"): "is more than the model's max_position_embeddings = 2048",
    (
        "",
        "trainer.training.global_batch_size=9",
    ): "is not a multiple of local_batch_size * dp_replicate * dp = 8",
    ("", "data.tokenizer=/nowhere"): "data.tokenizer = '/nowhere' has no tokenizer.json; give bytes, train",
    ("", "data.vocab_size=100"): "--set: data.vocab_size = 100 (int) is not allowed",
    ("", "model.sizes.vocab_size=300"): "the tokenizer has 1024 entries and the model's vocab_size is 300",
    ("", "model.sizes.num_experts=4"): "family llama3 has no mixture of experts; leave it out",
    (
        "",
        "model.sizes.hidden_size=66",
    ): "hidden_size=66 in [model.sizes] is not supported; allowed: a multiple of",
    ("", "model.sizes.num_key_value_heads=3"): "allowed: a divisor of num_attention_heads: 1, 2, 4",
    ("", "model.sizes.head_dim=7"): "head_dim=7 in [model.sizes] is not supported; allowed: an even number",
}


@pytest.mark.parametrize(("head", "text"), REFUSED, ids=" ".join)
def test_refused_in_one_line_with_place_key_and_remedy(job, head, text):
    with pytest.raises(BridgeError) as caught:
        job(head + LLAMA, text)
    assert REFUSED[head, text] in str(caught.value)
    assert "\n" not in str(caught.value)


FUNCTIONS = {
    "titan_bridge_raises:f": "titan_bridge_raises cannot be imported: ZeroDivisionError: division by zero",
    "nowhere.at_all:f": "nowhere.at_all cannot be imported",
    "torchtitan.models.llama3.config_registry:llama3_debugmodl": "did you mean llama3_debugmodel?",
    "torchtitan.components.optimizer:default_adamw": "returns OptimizersContainer.Config; it must be a Trainer.Config",
    "torchtitan.trainer:Trainer": "fails: TypeError",
    "no_colon": "is not module:function",
    "torchtitan.models.deepseek_v3.config_registry:deepseek_v3_debugmodel": "norm of a latent cannot be written",
}


@pytest.mark.parametrize("target", FUNCTIONS)
def test_refused_functions(job, target, tmp_path, monkeypatch):
    (tmp_path / "titan_bridge_raises.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BridgeError) as caught:
        job(f'[model]\nconfig = "{target}"\n')
    assert FUNCTIONS[target] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model\n", ":1:7: TOML syntax:"),
        ("lr = 1\nlr = 2\n", ":2:"),
        ("lr = 0.1\n", "the key model is missing; it is required"),
        ('[model]\nflavor = "8B"\n', "the key model.family is missing"),
        ('[model]\nfamily = "llama3"\n', "model.flavor and [model.sizes]: neither given"),
    ],
)
def test_refused_files(job, tmp_path, text, message):
    with pytest.raises(BridgeError) as caught:
        job(text)
    assert str(caught.value).startswith(str(tmp_path / "a.toml"))
    assert message in str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_command_shows_shipped_files_and_writes_nothing(path, tmp_path, capsys):
    options = ["--print-config", "--json", "--out", str(tmp_path / "o"), "--set", "lr=0.5"]
    assert cli.main(["train", str(path), *options]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["out"] == {"value": str(tmp_path / "o"), "origin": "--out"}
    assert values["lr"] == {"value": 0.5, "origin": "--set"}
    assert values["trainer.training.steps"]["origin"] == str(path)
    assert not (tmp_path / "o").exists()


def test_the_command_refuses_in_one_line_before_anything_is_written(tmp_path, capsys):
    file, out = str(ROOT / "configs/train/llama3_fsdp2.toml"), str(tmp_path / "o")
    other_kind = str(ROOT / "configs/infer/llama3_tp2.toml")
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.toml").write_bytes(b"lr = \xff")
    (tmp_path / "syntax.toml").write_text("lr = 1\n[model\n")
    for arguments, message in {
        (str(tmp_path / "none.toml"),): "does not exist; give a TOML file that does",
        (str(tmp_path / "empty"),): "empty cannot be read: Is a directory",
        (str(tmp_path / "binary.toml"),): "binary.toml is not UTF-8 text (byte 5)",
        (str(tmp_path / "syntax.toml"),): "syntax.toml:2:7: TOML syntax: ",
        (other_kind,): "by its keys dtype, generate, vllm; allowed here: data",
        (file, "--set", "data.path=/proc/self/mem"): "/proc/self/mem cannot be read",
        (file, "--nproc", "3"): "nproc=3 is not the product of the degrees",
        (file, "--set", "data.path=/nowhere"): "data.path = '/nowhere' does not exist",
        (file, "--set", f"data.path={tmp_path / 'empty'}"): "holds no text in files named *",
        (file, "--set", "parallel.tp=3"): "tp=3 does not divide n_heads=8, n_kv_heads=4",
        (file, "--set", "model.family=lama"): "did you mean llama3?",
    }.items():
        assert cli.main(["train", *arguments, "--out", out]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.startswith("titan-bridge: ")
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert not Path(out).exists()


def test_json_schema_of_training_describes_every_field():
    schema = reader.json_schema(KINDS["train"])
    classes = [TrainConfig]
    while classes:
        cls = classes.pop()
        part = schema if cls is TrainConfig else schema["$defs"][cls.__name__]
        assert set(part["properties"]) == {field.name for field in dataclasses.fields(cls)}
        for name, hint in typing.get_type_hints(cls).items():
            assert part["properties"][name]["description"], f"{cls.__name__}.{name} has no docstring"
            classes += [h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)]


def test_overrides_go_through_lists_and_dicts():
    config = Trainer.Config(optimizer=default_adamw(lr=1.0))
    values = {"optimizer": {"param_groups": {"0": {"optimizer_kwargs": {"lr": 0.25, "betas": [0.5, 0.75]}}}}}
    overrides.apply(config, values, {})
    kwargs = config.optimizer.param_groups[0].optimizer_kwargs
    assert (kwargs["lr"], kwargs["betas"]) == (0.25, (0.5, 0.75))


def test_the_cpu_refuses_what_it_cannot_do_and_a_gpu_refuses_the_shims(job):
    if not on_cpu():
        with pytest.raises(RuntimeError, match="for machines without an accelerator"):
            cpu.apply()
        return
    for path, value in cpu.REQUIRED.items():
        other = "spmd_types" if isinstance(value, str) else str(not value).lower()
        with pytest.raises(BridgeError, match="does not run on a CPU; allowed here"):
            job(LLAMA, f"trainer.{path}={other}")


def test_every_shim_says_why_and_until_when():
    for name, shim in cpu.SHIMS.items():
        assert all(vars(shim).values()), name
        assert "torchtitan 0.3.0" in shim.seen


DEEPSEEK = """
[model]
family = "deepseek_v3"
[model.sizes]
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_experts_per_tok = 2
moe_intermediate_size = 64
[model.sizes.other]
q_lora_rank = 32
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 16
v_head_dim = 16
first_k_dense_replace = 1
n_routed_experts = 4
n_group = 2
topk_group = 1
"""
GPT_OSS = """
[model]
family = "gpt_oss"
[model.sizes]
hidden_size = 64
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
num_experts = 4
num_experts_per_tok = 2
[model.sizes.other]
sliding_window = 16
"""


@pytest.mark.parametrize("text", [DEEPSEEK, GPT_OSS])
def test_fields_of_config_json_that_few_families_have(job, text):
    made = job(text, "data.tokenizer=bytes")
    assert made.expert_bias == ("deepseek" in text)
    assert made.hf_config["hidden_size"] == 64
    assert made.hf_config.get("n_routed_experts", made.hf_config.get("num_local_experts")) == 4
    served = family_for(made.hf_config).model_config(made.hf_config, expert_bias=made.expert_bias)
    with torch.device("meta"):
        ours, theirs = made.trainer.model_spec.model.build(), served.build()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {
        n: t.shape for n, t in theirs.state_dict().items()
    }
    windows = [layer.attention.inner_attention.window for layer in made.trainer.model_spec.model.layers]
    assert windows == ([16, None] if "gpt_oss" in text else [None, None])
