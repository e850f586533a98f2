"""LoRA adapters of a server: loaded and unloaded through vLLM's own routes, and updated live by a trainer.

The server has two replicas of a dense model, which step by themselves: all of them are updated.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torchtitan.components.lora import LoRAConverter

from tests.lora_samples import make_adapter, merged
from titan_bridge.errors import BridgeError
from titan_bridge.models import load_hf_config
from titan_bridge.models.adapters import use_plain_attention
from titan_bridge.models.build import build_on_meta, materialize
from titan_bridge.reference import Reference, load_reference
from titan_bridge.testing import make_checkpoint
from titan_bridge.transfer import Options, Trainer, TransferError

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

PROMPT = list(range(7, 47))
RANK, ALPHA = 4, 20.0
LAYERS = ["wqkv", "wo", "w1", "w2", "w3"]


def lora_model(model: Path) -> Reference:
    """TorchTitan's model with adapters of its own, whose products are as large as weights."""
    base = load_reference(model)
    converter = LoRAConverter.Config(rank=RANK, alpha=ALPHA, target_modules=LAYERS).build()
    config = converter.convert(base.family.model_config(load_hf_config(model)))
    use_plain_attention(config)
    made = materialize(build_on_meta(config, dtype=torch.float32), "cpu").eval().requires_grad_(False)
    made.load_state_dict(base.model.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in made.named_parameters():
        if ".lora_" in name:
            parameter.normal_(std=0.15 if ".lora_a" in name else 0.1, generator=generator)
    return Reference(family=base.family, model=made)


def expected(reference: Reference) -> torch.Tensor:
    return reference.logprobs(PROMPT)[torch.arange(len(PROMPT) - 1), PROMPT[1:]]


def test_an_adapter_comes_is_updated_live_and_goes(tmp_path: Path, serve: Callable[..., Any]) -> None:
    model = make_checkpoint(tmp_path / "model", "llama3", hidden_size=256, head_dim=32)
    folders = {
        name: make_adapter(tmp_path / name, model, seed=seed, rank=RANK, alpha=8, layers=(0, 1))
        for seed, name in enumerate(("policy", "other", "third"))
    }
    scaled: dict[str, dict[str, Any]] = {
        # By the square root of the rank, which makes it the trained one's.
        "stable": {"alpha": ALPHA / RANK**0.5, "use_rslora": True},
        "uneven": {"alpha": 8, "alpha_pattern": {"o_proj": 16}},
    }
    for name, config in scaled.items():
        folders[name] = make_adapter(tmp_path / name, model, seed=9, rank=RANK, layers=(0, 1), **config)
    trained, bare = lora_model(model), expected(load_reference(model))
    options = (
        "--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--enable-lora",
        "--dp", "2", "--api-server-count", "1", "--max-loras", "2", "--max-lora-rank", "8",
        "--served-model-name", "base", "--weight-transfer-config", json.dumps({"backend": "titan"}),
    )  # fmt: skip
    flags = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with (
        serve(model, tmp_path / "log", *options, **flags) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):

        def load(name: str) -> None:
            told = {"lora_name": name, "lora_path": str(folders[name])}
            http.post("/v1/load_lora_adapter", json=told).raise_for_status()

        def off(name: str, want: torch.Tensor) -> float:
            """Of the replica that is farther off."""
            asked = {"model": name, "prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 0}
            found = []
            for replica in "01":
                headers = {"X-data-parallel-rank": replica}
                answer = http.post("/v1/completions", json=asked, headers=headers).raise_for_status().json()
                rows = zip(answer["choices"][0]["prompt_logprobs"][1:], PROMPT[1:], strict=True)
                found.append(torch.tensor([row[str(token)]["logprob"] for row, token in rows]))
            return max((each - want).abs().max().item() for each in found)

        def send_to(name: str, **given: Any) -> Trainer:
            return Trainer(trained.model, url, adapter=name, options=Options(seconds=60), **given)

        assert "Serving TorchTitan's Llama3Model" in (tmp_path / "log").read_text()
        load("policy")
        as_loaded = expected(load_reference(merged(tmp_path / "merged", model, folders["policy"])))
        assert off("policy", as_loaded) < 1e-4
        with (
            send_to("nobody") as trainer,
            pytest.raises(TransferError, match="no LoRA adapter 'nobody' is loaded; loaded: policy"),
        ):
            trainer.send()
        with (
            send_to("policy", filter=lambda name: "layers.0" in name) as trainer,
            pytest.raises(BridgeError, match=r"layers\.1.* is in no source tensor"),
        ):
            trainer.send()
        assert off("policy", as_loaded) < 1e-4

        matrices = {name: each for name, each in trained.model.state_dict().items() if ".lora_" in name}
        with send_to("policy") as trainer:
            report = trainer.send("step 1")
            assert report.kind == "whole"
            # The adapter and not a byte more, to each replica.
            assert list(report.received.values()) == 2 * [sum(each.nbytes for each in matrices.values())]
            first = expected(trained)
            assert (first - as_loaded).abs().max() > 0.1
            assert off("policy", first) < 1e-4
            assert off("base", bare) < 1e-4
            assert http.get("/weight_info").json()["weight_version"] == "step 1"
            for name in ("other", "third"):  # more than there are places: vLLM evicts
                load(name)
                checkpoint = merged(tmp_path / f"merged {name}", model, folders[name])
                assert off(name, expected(load_reference(checkpoint))) < 1e-4
                assert off("policy", first) < 1e-4
            matrices["layers.1.feed_forward.w2.lora_b.weight"][:3] *= -3
            assert trainer.send("step 2").kind == "delta"
            second = expected(trained)
            assert (second - first).abs().max() > 1e-2
            assert off("policy", second) < 1e-4
            assert trainer.verify() == 2 * len(matrices)
            http.post("/v1/unload_lora_adapter", json={"lora_name": "policy"}).raise_for_status()
            assert http.post("/v1/completions", json={"model": "policy", "prompt": PROMPT}).status_code == 404
            load("policy")
            assert off("policy", as_loaded) < 1e-4
            with pytest.raises(TransferError, match="'policy' was loaded anew"):
                trainer.send()
            assert trainer.send("step 3").kind == "whole"
            assert off("policy", second) < 1e-4
        load("stable")
        tensors = trained.model.state_dict  # tensors alone, which say no scale
        with Trainer(tensors, url, adapter="stable", options=Options(seconds=60)) as trainer:
            assert off("stable", second) > 0.1
            trainer.send()
        assert off("stable", second) < 1e-4
        load("uneven")
        with (
            Trainer(tensors, url, adapter="uneven", options=Options(seconds=60)) as trainer,
            pytest.raises(TransferError, match=r"scales modules by \[2\.0, 4\.0\] \(alpha_pattern"),
        ):
            trainer.send()
        base = load_reference(model)
        base.model.norm.weight.mul_(1.5)
        # The weights again, by another trainer.
        with Trainer(base.model, url, options=Options(seconds=60)) as trainer:
            report = trainer.send("base")
            assert sum(report.received.values()) == report.lower_bound
            assert trainer.verify() == 2 * len(list(base.model.parameters()))
        assert off("base", expected(base)) < 1e-4
        assert off("other", bare) > 0.1
