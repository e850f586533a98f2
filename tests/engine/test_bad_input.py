"""Bad input gets the same line from `titan-bridge`, from `LLM(...)` and from `vllm serve`, and no process stays.

All three are the real entry points; none of them gets as far as starting a worker.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.engine.features import REFUSED
from titan_bridge.errors import BridgeError
from titan_bridge.testing import make_checkpoint, make_run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

DOORS = '''
"""Reads {case: [titan-bridge's arguments, LLM's options]}; prints what each way in says about each case."""
import contextlib, io, json, sys

from titan_bridge import cli


def command(arguments):
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        code = cli.main(["serve", *arguments, "--dry-run"])
    return f"exit code {code}: {printed.getvalue()}"


def llm(options):
    from vllm import LLM

    return said(lambda: LLM(model_impl="torchtitan", **options))


def serve(options):
    from vllm.entrypoints.cli.main import main

    options = dict(options)
    sys.argv = ["vllm", "serve", options.pop("model"), "--model-impl", "torchtitan", "--port", "0"]
    for name, value in options.items():
        text = [] if value is True else [json.dumps(value) if isinstance(value, dict) else str(value)]
        sys.argv += ["--" + name.replace("_", "-"), *text]
    return said(main)


def said(call):
    try:
        call()
    except (Exception, SystemExit) as error:
        return str(error)
    return ""


cases = json.loads(sys.stdin.read())
# vLLM's entry points change the process; ours goes first.
found = {name: {"titan-bridge": command(arguments)} for name, (arguments, _) in cases.items()}
for name, (_, options) in cases.items():
    found[name] |= {"LLM": llm(options), "vllm serve": serve(options)}
print()
print(json.dumps(found))
'''


def answers_of(program: str, job: Any, *arguments: str) -> Any:
    """What a Python program prints last, as JSON, when it reads `job` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def folder_with(
    model: Path,
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    weights: Callable[[Path], None] | None = None,
) -> str:
    """A copy of `model` with something wrong: fields of config.json, or what `weights` does to the weights file."""
    shutil.copytree(model, folder)
    if config is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if weights is not None:
        weights(next(folder.glob("*.safetensors")))
    return str(folder)


def test_every_way_in_says_the_same_line(tmp_path: Path, no_orphans: None) -> None:
    dense = make_checkpoint(tmp_path / "qwen3", "qwen3")
    moe = make_checkpoint(tmp_path / "qwen3_moe", "qwen3_moe")

    def bad(name: str, **changes: Any) -> str:
        return folder_with(dense, tmp_path / name, **changes)

    def missing_shard(weights: Path) -> None:
        tensors = load_file(weights)
        names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
        names["model.norm.weight"] = "model-00002-of-00002.safetensors"
        del tensors["model.norm.weight"]
        save_file(tensors, weights.with_name("model-00001-of-00002.safetensors"))
        weights.unlink()
        index = {"metadata": {"total_size": 0}, "weight_map": names}
        weights.with_name("model.safetensors.index.json").write_text(json.dumps(index))

    def other_shape(weights: Path) -> None:
        tensors = load_file(weights)
        save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"][:-1].clone()}, weights)

    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
    no_config = tmp_path / "no_config"
    no_config.mkdir()
    shutil.copy(next(dense.glob("*.safetensors")), no_config)
    titan = {"additional_config": {"titan": {"dens": "shard"}}}
    cases: dict[str, tuple[str, list[str], dict[str, Any], str]] = {
        "no config.json": (str(no_config), [], {}, "has no config.json"),
        "truncated": (bad("cut", weights=lambda w: w.write_bytes(w.read_bytes()[:-999])), [], {}, "truncated"),
        "index": (bad("index", weights=missing_shard), [], {}, "model-00002-of-00002.safetensors"),
        "weights of another model": (
            bad("other", weights=lambda w: w.write_bytes(next(moe.glob("*.safetensors")).read_bytes())), [], {},
            "does not fit qwen3: missing: ",
        ),
        "shape": (bad("shape", weights=other_shape), [], {}, "model.norm.weight"),
        "architecture": (
            bad("bert", config={"architectures": ["OPTForCausalLM"], "model_type": "opt"}), [], {}, "OPTForCausalLM",
        ),
        "bias": (bad("bias", config={"attention_bias": True}), [], {}, "attention_bias"),
        "yarn": (bad("yarn", config={"rope_parameters": yarn}), [], {}, "yarn"),
        "ep": (
            str(moe), ["--tp", "3", "--ep", "3"], {"tensor_parallel_size": 3, "enable_expert_parallel": True},
            "ep=3 does not divide num_experts=8; allowed with dp=1, tp=3: 1",
        ),
        "heads": (str(dense), ["--tp", "3"], {"tensor_parallel_size": 3}, "tp=3 does not divide n_heads=8, "),
        "head_dim": (bad("narrow", config={"head_dim": 16}), [], {}, "head_dim=16 has no kernel in vLLM's attention"),
        "rope limit": (str(dense), ["--max-model-len", "5000"], {"max_model_len": 5000}, "max_model_len=5000"),
        "our options": (
            str(dense), ["--set", "vllm.additional_config.titan.dens=shard"], titan,
            "unknown key additional_config.titan.dens; allowed: dense, ",
        ),
    }  # fmt: skip
    job = {
        name: [[model, *arguments], {"model": model, **options}]
        for name, (model, arguments, options, _) in cases.items()
    }
    found = answers_of(DOORS, job)
    wrong = []
    for name, (*_, expected) in cases.items():
        code, _, line = found[name]["titan-bridge"].partition(": titan-bridge: ")
        if code != "exit code 2" or line.count("\n") != 1 or expected not in line:
            wrong.append((name, "titan-bridge", found[name]["titan-bridge"]))
        wrong += [
            (name, door, text)
            for door, text in found[name].items()
            if door != "titan-bridge" and line.strip() not in text
        ]
    assert not wrong, "\n".join(map(str, wrong))


UNSUPPORTED = """
import json, sys
from vllm import EngineArgs


def answer(options):
    try:
        given = {"model": sys.argv[1], "model_impl": "torchtitan", **options}
        config = EngineArgs(**given).create_engine_config()
    except Exception as error:
        return str(error)
    model = config.model_config
    how = f"{config.additional_config}, {config.load_config.load_format}"
    return f"taken: {model.model} as {model.served_model_name}, {how}"


print(json.dumps([answer(options) for options in json.loads(sys.stdin.read())]))
"""


def filled(value: Any, model: str) -> Any:
    """Options of the table of features with the model's folder in them."""
    if isinstance(value, Mapping):
        return {key: filled(inner, model) for key, inner in value.items()}
    return model if value == "MODEL" else value


def test_what_is_not_supported_is_refused_by_name_and_a_run_is_found(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "qwen3", "qwen3")
    run = make_run(tmp_path / "out", model, model)
    steps = run / "checkpoint"
    moe = str(make_checkpoint(tmp_path / "moe", "qwen3_moe", tokenizer=False))
    gpt_oss = str(make_checkpoint(tmp_path / "gpt_oss", "gpt_oss", tokenizer=False))
    llama = str(make_checkpoint(tmp_path / "llama3", "llama3", tokenizer=False))
    narrow = str(make_checkpoint(tmp_path / "narrow", "deepseek_v3", tokenizer=False))
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}
    wide = str(make_checkpoint(tmp_path / "wide", "deepseek_v3", tokenizer=False, **latent))
    one_head = str(make_checkpoint(tmp_path / "one_head", "qwen3", tokenizer=False, num_key_value_heads=1))
    widths = {"rules": [{"match": {"kind": "attention"}, "plan": {"tp_size": 1}}]}

    def shorthand(value: int, **more: int) -> dict[str, Any]:
        return {"sharding": {"sharding_strategy": {"enable_dp_attention": value, **more}}}

    sharded = {"additional_config": {"titan": {"dense": "shard"}}}
    classifier = {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 2}
    speculation = {"model": str(model), "num_speculative_tokens": 2}
    longer = {"max_position_embeddings": 8192}
    cases: list[tuple[dict[str, Any], str]] = [
        *((filled(each.options, str(model)), each.said) for each in REFUSED),
        ({"model": gpt_oss, "data_parallel_size": 2, **sharded},
         "dense = 'shard' is not supported with the attention sinks of gpt_oss, of which vLLM's attention needs all"),
        ({"enable_expert_parallel": True}, "enable_expert_parallel is set, but"),
        ({}, f"taken: {model} as {model}, {{}}, titan"),
        ({"model": str(run)}, f"taken: {steps} as {run}, {{'titan': {{'step': 2}}}}, titan"),
        ({"model": str(steps)}, f"taken: {steps} as {steps}, {{'titan': {{'step': 2}}}}, titan"),
        ({"model": f"{steps}/step-1"}, f"taken: {steps} as {steps}/step-1, {{'titan': {{'step': 1}}}}, titan"),
        (
            {"model": str(run), "additional_config": {"titan": {"step": 3}}},
            f"{steps} has no whole checkpoint of step 3; whole ones: 1, 2",
        ),
        (
            {"model": f"{steps}/step-1", "additional_config": {"titan": {"step": 2}}},
            "step-1 is one step, and step 2 is asked for",
        ),
        ({"additional_config": {"titan": {"mla": "latent"}}}, "mla = 'latent' needs attention with latents"),
        ({"model": narrow, "additional_config": {"titan": {"mla": "latent"}}},
         "kv_lora_rank=32 and qk_rope_head_dim=16 have no kernel in vLLM's latent attention on CPUs"),
        ({"model": wide, "data_parallel_size": 2, "additional_config": {"titan": {"mla": "latent", "dense": "shard"}}},
         "derives matrices from whole weights, and dense = 'shard' keeps parts; set mla = 'expanded'"),
        ({"model": folder_with(model, tmp_path / "head", config=classifier)},
         "architecture Qwen3ForSequenceClassification is not supported"),
        ({"model": llama, "speculative_config": {"method": "eagle", **speculation, "model": llama}},
         "speculative method 'eagle' is not supported"),
        ({"model": moe, "additional_config": {"titan": {"ep": 2}}, "tensor_parallel_size": 2},
         "additional_config.titan.ep=2 needs enable_expert_parallel"),
        ({"hf_overrides": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}}, "yarn"),
        ({"hf_overrides": longer, "max_model_len": 9000}, "max_position_embeddings=8192; allowed: up to 8192"),
        ({"pipeline_parallel_size": 9}, "pp=9 is more than the "),
        ({"additional_config": {"titan": {"attention_dp": 2}}}, "attention_dp=2 does not fit tp=1 and n_heads="),
        ({"tensor_parallel_size": 2, "additional_config": {"titan": {"attention_dp": 1.5}}},
         "additional_config.titan.attention_dp"),
        ({"tensor_parallel_size": 4, "additional_config": {"titan": {"attention_dp": 2, "parallelism": widths}}},
         "attention_dp=2 cuts attention over tp/2 = 2 ranks, but parallelism says tp_size=1 for layers.0.attention"),
        ({"additional_config": shorthand(2)}, "enable_dp_attention is 2; allowed: 0, 1, true, false"),
        ({"additional_config": shorthand(1, expert_parallelism=2)},
         "unknown key additional_config.sharding.sharding_strategy.expert_parallelism"),
        ({"additional_config": {**shorthand(1), "titan": {"attention_dp": 2}}}, "leave one out"),
        # What must go on:
        ({"model": gpt_oss, "tensor_parallel_size": 2, **sharded}, "taken"),
        ({"tensor_parallel_size": 2, "model": one_head, "additional_config": shorthand(1)},
         f"taken: {one_head} as {one_head}, {{'titan': {{'attention_dp': 2}}}}, titan"),
        ({"tensor_parallel_size": 2, "additional_config": {"titan": {"attention_dp": True}}}, "taken"),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2, "model": moe,
          "additional_config": {"titan": {"attention_dp": 2}}}, "taken"),
        ({"additional_config": shorthand(0)}, "taken"),
        ({"hf_overrides": longer, "max_model_len": 4096}, "taken"),
        ({"speculative_config": {"method": "draft_model", **speculation}}, "taken"),
        ({"runner": "pooling"}, "taken"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "taken"),
        ({"model": moe, "additional_config": {"titan": {"ep": 1}}}, "taken"),
    ]  # fmt: skip
    answers = answers_of(UNSUPPORTED, [options for options, _ in cases], str(model))
    wrong = [(text, answer) for (_, text), answer in zip(cases, answers, strict=True) if text not in answer]
    assert not wrong, "\n".join(map(str, wrong))


def test_replicas_that_do_not_step_together_share_no_experts(tmp_path: Path) -> None:
    """As the workers of somebody else's launcher see it, which says nothing of the other replicas to vLLM."""
    from vllm import EngineArgs

    from titan_bridge.engine.model.build import setup_of_world

    model = str(make_checkpoint(tmp_path / "moe", "qwen3_moe", tokenizer=False))

    def setup(world: int, **options: Any) -> Any:
        given = {"model": model, "model_impl": "torchtitan", "skip_tokenizer_init": True, **options}
        return setup_of_world(EngineArgs(**given).create_engine_config(), world)

    experts, sharded = {"enable_expert_parallel": True}, {"additional_config": {"titan": {"dense": "shard"}}}
    for options, what in ((experts, "enable_expert_parallel"), (sharded, "dense = 'shard'")):
        line = (
            rf"^{what} joins all ranks, and 4 of them hold 2 replicas of 2 ranks, but data_parallel_size=1; "
        )
        with pytest.raises(BridgeError, match=line + "allowed: 2, "):
            setup(4, tensor_parallel_size=2, **options)
        assert setup(4, tensor_parallel_size=2, data_parallel_size=2, **options).sizes.dp == 2
        assert setup(2, tensor_parallel_size=2, **options).sizes.dp == 1
    assert setup(4, tensor_parallel_size=2).sizes.dp == 2  # nothing is shared over replicas
