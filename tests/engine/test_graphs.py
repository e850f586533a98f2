"""What CUDA graphs may hold: decided from the config, before a GPU is there to find out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from titan_bridge.mesh import Sizes
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(200)]

EP2 = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
SPREAD = {"data_parallel_size": 2, "enable_expert_parallel": True}
SHARD = {"data_parallel_size": 2, "additional_config": {"titan": {"dense": "shard"}}}
CASES = [
    # engine options, whether the grouped matmul asks nothing, mode asked for, mode that is left
    ("qwen3", {}, False, None, None),
    ("qwen3", {}, False, "FULL_AND_PIECEWISE", "FULL_AND_PIECEWISE"),
    ("qwen3", SHARD, False, None, "NONE"),
    ("qwen3", SHARD, False, "FULL_DECODE_ONLY", "NONE"),
    ("qwen3_moe", EP2, True, None, None),
    ("qwen3_moe", EP2, True, "FULL", "FULL"),
    ("qwen3_moe", EP2, False, None, "PIECEWISE"),
    ("qwen3_moe", SPREAD, False, "FULL_AND_PIECEWISE", "PIECEWISE"),
    ("qwen3_moe", SPREAD, False, "NONE", "NONE"),
    ("qwen3_moe", SHARD, True, "PIECEWISE", "NONE"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_checkpoint(folder / name, name, tokenizer=False) for name in ("qwen3", "qwen3_moe")}


def engine_config(model: Path, options: dict[str, Any]) -> Any:
    from vllm import EngineArgs

    return EngineArgs(
        model=str(model), model_impl="torchtitan", skip_tokenizer_init=True, **options
    ).create_engine_config()


@pytest.mark.parametrize(("model", "options", "captures", "asked", "left"), CASES)
def test_graphs_hold_what_they_can(
    models: dict[str, Path],
    model: str,
    options: dict[str, Any],
    captures: bool,
    asked: str | None,
    left: str | None,
) -> None:
    from vllm.config import CompilationConfig, CUDAGraphMode

    from titan_bridge.engine.model.build import setup_from
    from titan_bridge.engine.preflight import limit_graphs

    setup = setup_from(engine_config(models[model], options), dp=options.get("data_parallel_size", 1))
    compilation = CompilationConfig()
    if asked is not None:
        compilation.cudagraph_mode = CUDAGraphMode[asked]
    limit_graphs(compilation, setup, captures=captures)
    assert compilation.cudagraph_mode == (None if left is None else CUDAGraphMode[left])


def test_a_step_that_gathers_weights_in_hooks_is_not_compiled(models: dict[str, Path]) -> None:
    from titan_bridge.engine.model.wrapper import _compiles

    one_rank = {"additional_config": SHARD["additional_config"]}
    compiled = [_compiles(engine_config(models["qwen3"], options)) for options in ({}, one_rank, SHARD)]
    assert compiled == [True, True, False]


def test_without_a_gpu_there_are_none(models: dict[str, Path]) -> None:
    from vllm.config import CUDAGraphMode

    config = engine_config(models["qwen3_moe"], SPREAD)
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


@pytest.mark.parametrize(
    ("options", "fields", "dtype", "capability", "kernel"),
    [
        (EP2, {}, "bfloat16", (9, 0), "torch"),
        (EP2, {}, "bfloat16", (10, 0), "torch"),
        (EP2, {}, "bfloat16", (8, 0), "triton"),
        (EP2, {}, "bfloat16", (12, 0), "triton"),
        (EP2, {}, "float16", (9, 0), "triton"),
        (EP2, {}, "float16", (7, 5), None),
        (EP2, {}, "float32", (9, 0), None),
        (EP2, {}, "bfloat16", None, None),
        (SPREAD, {}, "bfloat16", (9, 0), "torch"),
        (SPREAD, {}, "bfloat16", (8, 9), "triton"),
        # Rows of torch._grouped_mm are multiples of 16 bytes; what is no multiple is computed expert by expert.
        (EP2, {"moe_intermediate_size": 60}, "bfloat16", (9, 0), "triton"),
        (EP2, {"moe_intermediate_size": 72}, "bfloat16", (9, 0), "torch"),
        ({"tensor_parallel_size": 2}, {"moe_intermediate_size": 72}, "bfloat16", (9, 0), "triton"),
        ({"tensor_parallel_size": 2}, {"moe_intermediate_size": 80}, "bfloat16", (9, 0), "torch"),
        (EP2, {"hidden_size": 132}, "bfloat16", (9, 0), "triton"),
    ],
)
def test_the_kernel_of_routed_experts_asks_the_host_nothing(
    models: dict[str, Path],
    options: dict[str, Any],
    fields: dict[str, int],
    dtype: str,
    capability: tuple[int, int] | None,
    kernel: str | None,
) -> None:
    import torch
    from vllm.platforms.interface import DeviceCapability

    from titan_bridge.engine.model.build import captures_experts, experts_kernel, setup_from
    from titan_bridge.models.adapters import keep_expert_dtype

    setup = setup_from(engine_config(models["qwen3_moe"], options), dp=options.get("data_parallel_size", 1))
    config = setup.family.model_config({**setup.hf, **fields}, padded_vocab=setup.padded_vocab)
    keep_expert_dtype(config)
    setup = replace(setup, config=config)
    gpu = DeviceCapability(*capability) if capability else None
    assert experts_kernel(setup, getattr(torch, dtype), gpu) == kernel
    assert captures_experts(setup, getattr(torch, dtype), gpu) == (
        kernel is not None and options is not SPREAD
    )


def test_a_compiled_step_is_named_by_what_it_was_made_from(models: dict[str, Path]) -> None:
    from titan_bridge.engine.model.build import setup_from
    from titan_bridge.engine.model.compiled import KEY, name_compiled_step

    given = {"titan": {"cpu_pack": False}}
    config = engine_config(models["qwen3_moe"], {"additional_config": given})
    setup = setup_from(config, dp=1)
    before = config.compute_hash()

    def name(setup: Any) -> str:
        config.additional_config = given
        name_compiled_step(config, setup)
        assert config.additional_config["titan"] == given["titan"]
        assert config.compute_hash() != before
        return config.additional_config[KEY]

    others = [
        replace(setup, expert_bias=True),  # a buffer that only the checkpoint knows of
        replace(setup, hf={**setup.hf, "rms_norm_eps": 1e-3}),  # config.json, edited in its place
        replace(setup, sizes=Sizes(dp=1, tp=2, ep=1)),
    ]
    names = {name(setup), *(name(other) for other in others)}
    assert len(names) == 4
    assert name(setup) in names

    hashed = config.compute_hash()
    config.additional_config = {"titan": {**given["titan"], "step": 80}}  # all steps of a run compute alike
    name_compiled_step(config, setup)
    assert config.compute_hash() == hashed


def test_nothing_is_named_where_nothing_is_compiled(models: dict[str, Path]) -> None:
    from titan_bridge.engine.model.build import setup_from
    from titan_bridge.engine.model.compiled import name_compiled_step

    config = engine_config(models["qwen3"], {"enforce_eager": True})
    name_compiled_step(config, setup_from(config, dp=1))
    assert not config.additional_config
