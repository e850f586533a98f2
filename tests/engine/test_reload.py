"""`reload_weights` on a running engine: other weights of any format, in place; what does not fit changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from titan_bridge.checkpoint.job import Options
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.testing import make_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]


def answers(llm: Any) -> list[float]:
    """Log-probabilities of the tokens of a prompt."""
    from vllm import SamplingParams

    given = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    llm.reset_prefix_cache()
    (output,) = llm.generate([{"prompt_token_ids": list(range(5, 45))}], given, use_tqdm=False)
    return [next(iter(row.values())).logprob for row in output.prompt_logprobs[1:]]


def stream(worker: Any, file: str) -> None:
    """On a worker: tensors instead of a directory."""
    worker.reload_weights(weights_iterator=iter(load_file(file).items()))


def test_other_weights_of_any_format_come_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_bridge.engine.offline import engine

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send a function to the workers
    a, b = (
        make_checkpoint(tmp_path / name, "qwen3", seed=seed, dtype=torch.bfloat16, tokenizer=False)
        for seed, name in enumerate("ab")
    )
    prepare(Options(source=b, target=tmp_path / "dcp", to="dcp")).run()
    config = InferConfig(
        model=str(a),
        parallel=Parallel(tp=2),
        max_model_len=128,
        vllm={"enforce_eager": True, "skip_tokenizer_init": True},
    )
    with engine(config) as (llm, workers, _):
        assert workers[0]["model_class"] == "titan_bridge.engine.vllm_wrapper.TitanForCausalLM"

        def reload(**kwargs: Any) -> list[float]:
            llm.collective_rpc("reload_weights", kwargs=kwargs)
            return answers(llm)

        of_a = answers(llm)
        of_b = reload(weights_path=str(b))
        assert of_b != of_a
        assert reload(weights_path=str(a)) == of_a
        assert reload(weights_path=str(tmp_path / "dcp")) == of_b
        llm.collective_rpc(stream, args=(str(a / "model.safetensors"),))
        assert answers(llm) == of_a
        assert reload() == of_b  # what was given last, from the disk

        # The same directory, with a checkpoint that does not fit.
        broken = load_file(b / "model.safetensors")
        broken["model.norm.weight"] = broken["model.norm.weight"][:7].clone()
        (tmp_path / "c").mkdir()
        save_file(broken, tmp_path / "c" / "model.safetensors")
        for path, reason in (("c", r"model\.norm\.weight"), ("nowhere", "holds no weights")):
            with pytest.raises(Exception, match=reason):
                llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path / path)})
            assert answers(llm) == of_b
        assert reload() == of_b
