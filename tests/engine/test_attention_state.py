"""What attention layers keep besides our parameters: the matrices that a latent cache derives, and sinks.

Each engine starts from a quantized checkpoint and takes other weights while it runs, live and from a directory.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import float64
from tests.unit.quantized_samples import make_fp8, make_mxfp4, multiplied_out
from titan_bridge import parity
from titan_bridge.config.schema import InferConfig
from titan_bridge.engine import specs
from titan_bridge.models import load_hf_config
from titan_bridge.testing import make_checkpoint
from titan_bridge.transfer import Options, Trainer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

LATENT = {  # the widths that vLLM's latent attention computes on CPUs
    "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "head_dim": 64, "v_head_dim": 32,
}  # fmt: skip
EXPANDED = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "head_dim": 32, "v_head_dim": 24}
CASES: dict[str, tuple[str, Callable[..., Path], dict[str, Any], dict[str, Any]]] = {
    "latent": ("deepseek_v3", make_fp8, LATENT, {"additional_config": {"titan": {"mla": "latent"}}}),
    "expanded": ("deepseek_v3", make_fp8, EXPANDED, {}),
    "sinks": ("gpt_oss", make_mxfp4, {"sliding_window": 48}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_derived_from_the_weights_that_are_served_now(
    case: str, tmp_path: Path, no_orphans: None
) -> None:
    from titan_bridge.engine.run.offline import engine

    family, make, fields, options = CASES[case]
    quantized = make(tmp_path, **fields)
    other = make_checkpoint(tmp_path / "other", family, seed=1, tokenizer=False, **fields)  # type: ignore[arg-type]
    config = InferConfig(
        model=str(quantized),
        dtype="float32",
        max_model_len=parity.LONGEST,
        vllm={
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "kv_cache_memory_bytes": 64 << 20,
            "weight_transfer_config": {"backend": "titan"},
            **options,
        },
    )
    found: list[tuple[Path, list[dict[str, Any]]]] = []
    full = multiplied_out(quantized, tmp_path / "multiplied_out")
    with engine(config) as (llm, workers, _):
        assert workers[0]["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
        (findings,) = specs.verify(llm, str(full))  # of what the layout has, and nothing that is derived
        assert [each for each in findings if not each["equal"]] == []
        form = "" if case == "sinks" else f"{case} "
        assert workers[0]["attention"].startswith(f"{form}attention with a cache of "), workers[0][
            "attention"
        ]
        if case == "latent":
            other_form = 4 * 2 * 2 * 8 * 96  # bytes, layers, keys and values, heads, their width
            assert workers[0]["attention"].endswith(f" 4,608 bytes a token (expanded: {other_form:,})")

        for checkpoint in (quantized, full):
            (verified,) = llm.collective_rpc("titan_verify_specs", args=(str(checkpoint),))
            assert len(verified) > 20
            assert [found for found in verified if not found["equal"]] == []
        answers = asking(llm, load_hf_config(quantized)["vocab_size"])
        started = answers()
        for model in send(llm, other, tmp_path / "patched"):
            found.append((model, answers()))
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(quantized)})
        found.append((full, answers()))
    assert [name for name, _ in parity.references(quantized)] == ["TorchTitan"]
    for model, completions in [(full, started), *found]:
        for name, logprobs in parity.references(model):
            difference = parity.compare(completions, name, logprobs)
            print(f"{case} {model.name}: {name} max {difference.max:.1e} over {difference.tokens}")
            assert difference.tokens > 700
            assert difference.holds(1e-4, greedy=True)
    # TorchTitan's own forward rounds by more than 1e-5 here; what is served is as near to float64 as that, on average.
    (_, float32) = list(parity.references(full))[-1]
    served, own = float64.errors(started, float32, float64.referee(full))
    print(f"{case}: to float64 served max {served.max:.1e} mean {served.mean:.1e}, "
          f"TorchTitan in float32 {own.max:.1e} {own.mean:.1e}")  # fmt: skip
    assert all(found.not_finite is None for found in (served, own))
    assert served.max <= 3 * own.max <= 1e-4  # type: ignore[operator]
    assert served.mean <= 1.2 * own.mean  # type: ignore[operator]


def asking(llm: Any, vocab_size: int) -> Callable[[], list[dict[str, Any]]]:
    """What returns greedy completions of the fixed prompts, with log-probabilities of these, too."""
    from titan_bridge.engine.run.offline import complete

    def answers() -> list[
        dict[str, Any]
    ]:  # without `llm` among its arguments: where it fails, pytest would ask it
        llm.reset_prefix_cache()
        greedy = {"temperature": 0, "max_tokens": 16, "logprobs": 0, "prompt_logprobs": 0}
        greedy |= {"ignore_eos": True, "detokenize": False}
        return [dataclasses.asdict(each) for each in complete(llm, parity.prompts(vocab_size), greedy)[0]]

    return answers


def backends(worker: Any) -> list[str]:
    """On a worker: vLLM's backend of each attention."""
    layers = worker.model_runner.model.model.layers.values()
    return [layer.attention.inner_attention.paged.get_attn_backend().get_name() for layer in layers]


@pytest.mark.parametrize(("dense", "expands"), [("shard", True), ("replicate", False)])
def test_an_offline_dp_rank_with_parts_of_the_weights_caches_no_latents(
    dense: str, expands: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is cached is decided before vLLM reads from the environment that there are other ranks."""
    from vllm import EngineArgs

    from titan_bridge.engine.patches.upstream import expands_latents

    args = EngineArgs(model=str(tmp_path), additional_config={"titan": {"dense": dense}})
    assert not expands_latents(args, on_cpu=False)
    monkeypatch.setenv("VLLM_DP_SIZE", "2")
    assert expands_latents(args, on_cpu=False) is expands


def test_a_backend_with_sinks_in_float32_keeps_their_address(tmp_path: Path) -> None:
    """A captured CUDA graph reads them there. b12x, as FlashInfer, which does not import here."""
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends.b12x import B12xPagedAttentionImpl

    from titan_bridge.engine.model.attention import PagedAttention, bind_sinks
    from titan_bridge.models.adapters import inner_attention
    from titan_bridge.models.gpt_oss import GptOss

    model = make_checkpoint(tmp_path / "gpt_oss", "gpt_oss", tokenizer=False)
    given = EngineArgs(model=str(model), model_impl="torchtitan", skip_tokenizer_init=True)
    computes = inner_attention(GptOss().model_config(load_hf_config(model)).layers[0].attention)
    attention = torch.nn.Module()
    with set_current_vllm_config(given.create_engine_config()):
        attention.inner_attention = PagedAttention(PagedAttention.Config(layer=0, tp=1, computes=computes))
    impl = object.__new__(B12xPagedAttentionImpl)  # its constructor asks a GPU
    impl._sinks_source, impl.sinks = torch.empty(computes.n_heads, dtype=torch.bfloat16), None
    attention.inner_attention.paged.impl = impl
    seen = []
    for value in (1, 2):  # at the start, and with new weights
        attention.sinks = torch.nn.Parameter(torch.full((computes.n_heads,), value, dtype=torch.bfloat16))
        bind_sinks(attention, torch.bfloat16)
        assert torch.equal(impl.sinks, torch.full((computes.n_heads,), float(value)))
        seen.append(impl.sinks)
    assert seen[0] is seen[1]


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this processor has no AMX")
def test_latents_in_bfloat16_follow_the_weights_where_the_backend_drops_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_orphans: None
) -> None:
    """The one for AMX packs what it derives, and would then drop the weight that it is derived from."""
    from titan_bridge.engine.run.offline import engine

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send a function to the worker
    sizes = {"dtype": torch.bfloat16, "tokenizer": False, "std": 0.05, **LATENT}
    a, b = (make_checkpoint(tmp_path / name, "deepseek_v3", seed=i, **sizes) for i, name in enumerate("ab"))  # type: ignore[arg-type]
    options = {"enforce_eager": True, "skip_tokenizer_init": True, "kv_cache_memory_bytes": 64 << 20}
    config = InferConfig(model=str(a), max_model_len=parity.LONGEST, vllm=options | CASES["latent"][3])
    found = {}
    with engine(config) as (llm, workers, _):
        assert workers[0]["model_class"] == "titan_bridge.engine.model.wrapper.TitanForCausalLM"
        assert llm.collective_rpc(backends) == [["AMX_MLA"] * 2]
        answers = asking(llm, load_hf_config(a)["vocab_size"])
        found[a] = answers()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(b)})
        found[b] = answers()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(a)})
        assert answers() == found[a]
    for model, other in ((a, b), (b, a)):
        (name, logprobs) = list(parity.references(model))[-1]
        near, far = (parity.compare(found[each], name, logprobs) for each in (model, other))
        print(f"{model.name}: {name} mean {near.mean:.1e}, with other weights {far.mean:.1e}")
        assert near.mean < 0.05 * far.mean  # type: ignore[operator]


def send(llm: Any, model: Path, patched: Path) -> Iterator[Path]:
    """Send a checkpoint's tensors to the engine, as a trainer in this process, then some elements of each.

    Yields the checkpoint that the engine should have now.
    """
    from titan_bridge.engine.transfer import LLMClient

    held = load_file(model / "model.safetensors")
    with Trainer(lambda: held, LLMClient(llm), options=Options(seconds=60)) as trainer:
        trainer.send()
        yield model
        for tensor in held.values():
            tensor.view(-1)[::7] *= 1.5
        assert trainer.send().kind == "delta"
    shutil.copytree(model, patched)
    save_file(held, patched / "model.safetensors", metadata={"format": "pt"})
    yield patched
