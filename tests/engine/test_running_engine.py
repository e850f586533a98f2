"""What a trainer asks of an engine that runs: other weights in place, and which experts saw a token.

In bfloat16 the CPU backend computes with packed weights, beside which plain ones exist only while they are loaded.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.collectives import groups, seen, watch
from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.engine.cpu.eager import norm_rounds
from titan_bridge.reference import load_reference
from titan_bridge.testing import make_checkpoint, make_run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

PROMPT = list(range(5, 45))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints of one mixture of experts, with a dense layer: folders, a run's steps 1 and 2, and the first as
    another program names it, in a DCP."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": 3, "mlp_only_layers": [1], "tokenizer": False}
    made = {name: make_checkpoint(folder / name, "qwen3_moe", seed=i, **sizes) for i, name in enumerate("ab")}
    run = make_run(folder / "out", made["a"], made["b"])
    foreign = {f"net.{name}": tensor for name, tensor in load_file(made["a"] / "model.safetensors").items()}
    dcp.save(foreign | {"step": 7}, checkpoint_id=str(folder / "foreign"), no_dist=True)
    shutil.copy(made["a"] / "config.json", folder / "foreign")
    return made | {"run": run, "step": run / "checkpoint/step-1", "foreign": folder / "foreign"}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llm(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[Any]:
    """An engine that serves checkpoint a: in bfloat16 as a step of a run, in float32 under names of another program."""
    from titan_bridge.engine.run.offline import engine

    served, options = "step", {}
    if request.param == "float32":
        served, options = "foreign", {"additional_config": {"titan": {"names": "net.{}"}}}
    config = InferConfig(
        model=str(models[served]),
        dtype=request.param,
        parallel=Parallel(tp=2, ep=2),
        max_model_len=128,
        vllm={"enforce_eager": True, "skip_tokenizer_init": True, **options},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send a function to the workers
        with engine(config) as (started, workers, _):
            assert workers[0]["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
            yield started


def answers(llm: Any) -> list[float]:
    """Log-probabilities of the tokens of a prompt."""
    from vllm import SamplingParams

    given = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    llm.reset_prefix_cache()
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], given, use_tqdm=False)
    return [next(iter(row.values())).logprob for row in output.prompt_logprobs[1:]]


def capture(worker: Any) -> None:
    """On a worker: what vLLM does for `enable_return_routed_experts`, which its runner for CPUs does not."""
    from vllm.model_executor.layers.fused_moe import routed_experts_capturer as vllm

    runner = worker.model_runner
    runner.capturer = vllm.RoutedExpertsCapturer(256, runner.vllm_config)
    vllm.bind_routed_experts_capturer(runner.model, runner.capturer)


def captured(worker: Any) -> list[list[list[int]]]:
    return worker.model_runner.capturer.snapshot_routing_data(len(PROMPT)).tolist()


@pytest.mark.parametrize("llm", ["float32"], indirect=True)
def test_the_engine_says_which_experts_saw_a_token(models: dict[str, Path], llm: Any) -> None:
    llm.collective_rpc(capture)
    answers(llm)
    first, second = (torch.tensor(ids_TLK) for ids_TLK in llm.collective_rpc(captured))
    assert torch.equal(first, second)
    reference = load_reference(models["a"])
    chosen: dict[str, torch.Tensor] = {}
    for name, layer in reference.model.layers.items():
        if hasattr(layer, "moe"):
            layer.moe.router.register_forward_hook(
                lambda _, __, out, name=name: chosen.update({name: out[1][0]})
            )
    reference.logits(PROMPT)
    assert sorted(chosen) == ["0", "2"]
    for name, ids_TK in chosen.items():
        assert torch.equal(first[:, int(name)].sort().values, ids_TK.sort().values), name
    assert len(first[:, 0].unique()) > 4  # of 8 experts


@pytest.mark.parametrize("llm", ["float32"], indirect=True)
def test_a_step_has_no_collective_but_at_the_boundaries_of_its_layers(llm: Any) -> None:
    """As many as vLLM's own model of the same layers has, all over vLLM's tp group; and nothing makes groups later."""
    from vllm import SamplingParams

    made = llm.collective_rpc(groups)
    llm.collective_rpc(watch)
    given = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": PROMPT}], given, use_tqdm=False)
    llm.collective_rpc("reload_weights")
    # The embedding; attention and MLP or experts of three layers; the head.
    step = {"allreduce tp": 1 + 2 * 3, "allgather tp": 1}
    for rank, (steps, count) in enumerate(llm.collective_rpc(seen)):
        assert steps == [step] * 3
        meshes = [ranks for name, ranks in made[rank] if name.startswith("mesh_")]
        # Torch's default group, and of each of vLLM's one for the device and one for the host.
        assert len(made[rank]) == 1 + 2 * count + len(meshes)
        # TorchTitan's meshes are of ranks alone here, over which nothing travels.
        assert meshes == [[rank]] * len(meshes)
    assert llm.collective_rpc(groups) == made


class Calls(TorchDispatchMode):
    """Counts operators by name while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def step(worker: Any) -> dict[str, int]:
    """On a worker: how often a step of one token calls each operator."""
    with Calls() as calls:
        worker.execute_dummy_batch()
    return dict(calls.counted)  # the answer of an RPC: plain types


def test_norms_and_rotations_of_a_step_in_bfloat16_are_operators_of_vllms(llm: Any) -> None:
    """In float32, the referee, they are torch's."""
    operators = "_C::rms_norm", "_C::rotary_embedding"
    norms = 4 * 3 + 1 if norm_rounds() else 0
    counted = [norms, 3] if llm.llm_engine.model_config.dtype == torch.bfloat16 else [0, 0]
    for found in llm.collective_rpc(step):
        assert [found.get(name, 0) for name in operators] == counted


def bytes_held(worker: Any) -> int:
    """On a worker: memory of its parameters, some of which share one piece."""
    storages = [parameter.untyped_storage() for parameter in worker.model_runner.model.model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_live_weights_are_those_of_the_checkpoint(models: dict[str, Path], llm: Any) -> None:
    before, held = answers(llm), llm.collective_rpc(bytes_held)
    for findings in llm.collective_rpc("titan_verify_specs", args=(str(models["a"]),)):
        assert len(findings) > 20
        assert [finding for finding in findings if not finding["equal"]] == []
    for findings in llm.collective_rpc("titan_verify_specs", args=(str(models["b"]),)):
        # Norms are ones in both.
        assert sum(not finding["equal"] for finding in findings) > len(findings) / 2
    assert (answers(llm), llm.collective_rpc(bytes_held)) == (before, held)
    everything = [report["local_bytes"] for report in llm.collective_rpc("bridge_report")]
    if str(llm.llm_engine.model_config.dtype) == "torch.bfloat16":
        assert all(found < whole / 2 for found, whole in zip(held, everything, strict=True))
    else:
        assert held == everything


def discard(worker: Any) -> list[str]:
    """On a worker: what sleeping at level 2 loses, and what vLLM keeps and brings back when it wakes the engine."""
    model = worker.model_runner.model
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(7)
    for name, buffer in model.named_buffers():
        buffer.data.copy_(kept[name])
    return list(kept)


def test_weights_that_slept_come_back_with_a_reload(llm: Any) -> None:
    before = answers(llm)
    for kept in llm.collective_rpc(discard):
        assert any("rope" in name and name.endswith("cache") for name in kept), kept
    assert answers(llm) != before
    llm.collective_rpc("reload_weights")
    assert answers(llm) == before


def stream(worker: Any, file: str) -> None:
    """On a worker: tensors instead of a directory."""
    worker.reload_weights(weights_iterator=iter(load_file(file).items()))


def test_other_weights_of_any_format_come_in_place(models: dict[str, Path], llm: Any, tmp_path: Path) -> None:
    def reload(**kwargs: Any) -> list[float]:
        llm.collective_rpc("reload_weights", kwargs=kwargs)
        return answers(llm)

    of_a = answers(llm)
    of_b = reload(weights_path=str(models["b"]))
    assert of_b != of_a
    assert reload(weights_path=str(models["a"])) == of_a
    assert reload(weights_path=str(models["step"])) == of_a
    assert reload() == of_a
    if llm.llm_engine.vllm_config.additional_config.get("titan", {}).get("names"):
        assert reload(weights_path=str(models["b"])) == of_b
        assert reload(weights_path=str(models["foreign"])) == of_a
        assert reload() == of_a
    else:
        with pytest.raises(Exception, match=r"unexpected: net\."):
            reload(weights_path=str(models["foreign"]))
        assert answers(llm) == of_a
    assert reload(weights_path=str(models["step"].with_name("step-2"))) == of_b
    assert reload(weights_path=str(models["step"])) == of_a
    assert reload(weights_path=str(models["run"])) == of_b
    llm.collective_rpc(stream, args=(str(models["a"] / "model.safetensors"),))
    assert answers(llm) == of_a
    assert reload() == of_b  # what was read last

    broken = load_file(models["b"] / "model.safetensors")
    broken["model.norm.weight"] = broken["model.norm.weight"][:7].clone()
    (tmp_path / "c").mkdir()
    save_file(broken, tmp_path / "c" / "model.safetensors")
    for path, reason in (("c", r"model\.norm\.weight"), ("nowhere", "holds no weights")):
        with pytest.raises(Exception, match=reason):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path / path)})
        assert answers(llm) == of_b
    assert reload() == of_b


def reload_own(worker: Any, paths: list[str]) -> None:
    """On a worker: what two nodes do that find different things under one path."""
    worker.reload_weights(weights_path=paths[worker.rank])


def test_ranks_that_find_different_weights_refuse_them(
    models: dict[str, Path], llm: Any, tmp_path: Path
) -> None:
    a, b = str(models["a"]), str(models["b"])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": a})
    of_a = answers(llm)
    for paths, reason in (
        ([a, b], rf"different weights, .*rank 0: \S+:{a}; rank 1: \S+:{b}"),
        ([b, str(tmp_path)], rf"{tmp_path} holds no weights"),
    ):
        with pytest.raises(Exception, match=reason):
            llm.collective_rpc(reload_own, args=(paths,))
        assert answers(llm) == of_a
    copy = str(shutil.copytree(models["b"], tmp_path / "copy"))
    llm.collective_rpc(reload_own, args=([b, copy],))
    assert answers(llm) != of_a


def test_weights_are_not_saved_in_vllms_sharded_format(llm: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="save_sharded_state is not supported with model_impl='torchtitan'"):
        llm.llm_engine.engine_core.save_sharded_state(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_draft_model_is_vllms_and_all_its_drafts_are_accepted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The draft is the served checkpoint itself, so only another model or other weights could be refused."""
    from titan_bridge.engine.run.offline import complete, drafts, engine

    model = str(make_checkpoint(tmp_path / "model", "qwen3", tokenizer=False))
    draft = {"method": "draft_model", "model": model, "num_speculative_tokens": 3}
    config = InferConfig(
        model=model,
        dtype="float32",
        max_model_len=128,
        vllm={
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "speculative_config": draft,
            "weight_transfer_config": {"backend": "titan"},
        },
    )
    with engine(config) as (llm, workers, _):
        assert workers[0]["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
        sampling = {"max_tokens": 24, "temperature": 0, "detokenize": False, "ignore_eos": True}
        ((completion,), _) = complete(llm, [PROMPT], sampling)
        counted = drafts(llm)
    assert f"Weight updates leave the draft model {model} as it is" in "".join(capfd.readouterr())
    assert counted["draft"] >= 18
    assert counted["accepted"] == counted["draft"]
    expected_LV = load_reference(model).logprobs([*PROMPT, *completion.token_ids])
    assert list(completion.token_ids) == expected_LV[len(PROMPT) - 1 : -1].argmax(-1).tolist()
