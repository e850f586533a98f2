"""What of vLLM works with TorchTitan's classes, what is refused, and what vLLM has not on CPUs: one table.

The tests of the engine run it; `python -m tests.engine.features` writes it as titan_bridge/engine/FEATURES.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[2] / "titan_bridge/engine/FEATURES.md"

LONG = [(7 * i) % 700 for i in range(300)]
"""More tokens than a step of the test's engines takes, and than two blocks of the cache."""

_SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
    "required": ["n", "kind"],
    "additionalProperties": False,
}
_CHAT = [{"role": "user", "content": "def main():"}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Same:
    """Works as with vLLM's own model: the same answers to the same requests."""

    name: str
    requests: tuple[tuple[str, Mapping[str, Any] | None], ...] = ()
    """Path and JSON, None for GET; `model` is added."""
    test: str = ""
    """The test in this folder that shows it otherwise, "file.py::function"."""
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """Stops at start with one line."""

    name: str
    options: Mapping[str, Any]
    """Of vLLM's `EngineArgs`; "MODEL" stands for the served model."""
    said: str
    """In that line."""
    by_vllm: bool = False
    """vLLM refuses it on CPUs, whatever the model; we would not."""
    note: str = ""


def _complete(prompt: Any = "def main(", **options: Any) -> tuple[str, dict[str, Any]]:
    given = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 3, "ignore_eos": True}
    return "/v1/completions", {**given, **options}


def _chat(**options: Any) -> tuple[str, dict[str, Any]]:
    given = {"messages": _CHAT, "max_tokens": 12, "temperature": 0}
    return "/v1/chat/completions", {**given, **options}


def _sampled(**options: Any) -> tuple[str, dict[str, Any]]:
    return _complete(temperature=0.9, seed=7, **options)


SAME = (
    Same(
        name="Greedy decoding, log-probabilities of tokens and of the prompt, echo",
        requests=(
            _complete(),
            _complete([5, 9, 13, 200, 31], logprobs=5, return_token_ids=True),
            _complete(prompt_logprobs=2, max_tokens=1),
            _complete(echo=True, max_tokens=4),
            _complete(["import", "class A:", "x"]),
        ),
    ),
    Same(
        name="Sampling: temperature, top-p, top-k, min-p, seeds; several answers (n)",
        requests=(
            _sampled(), _sampled(top_p=0.7), _sampled(top_k=5), _sampled(min_p=0.05), _sampled(n=3),
            _sampled(prompt=["import", "class"], n=2),
        ),
    ),
    Same(
        name="Penalties (presence, frequency, repetition), logit bias, bad and allowed tokens",
        requests=(
            _complete(presence_penalty=1.5), _complete(frequency_penalty=1.5),
            _complete(repetition_penalty=1.7, max_tokens=24), _complete(logit_bias={"17": 6.0, "300": 4.0}),
            _complete(allowed_token_ids=list(range(40, 90))), _complete(bad_words=["e", "("]),
        ),
    ),
    Same(
        name="Stop strings and tokens, min_tokens, truncated prompts",
        requests=(
            _complete(stop=["a", "e", "i"], max_tokens=40), _complete(stop_token_ids=list(range(100)), max_tokens=40),
            _complete(min_tokens=6, stop_token_ids=list(range(700)), max_tokens=12),
            _complete(LONG, truncate_prompt_tokens=20),
        ),
    ),
    Same(
        name="Beam search",
        requests=(_complete(use_beam_search=True, n=4), _complete(use_beam_search=True, n=2, length_penalty=0.5)),
    ),
    Same(
        name="Structured outputs: JSON schema, regular expression, choice, grammar",
        requests=(
            _complete(structured_outputs={"json": _SCHEMA}, max_tokens=40),
            _complete(structured_outputs={"regex": "[ab]{3}-[0-9]{2}"}, max_tokens=20),
            _complete(structured_outputs={"choice": ["north", "south"]}, max_tokens=10),
            _complete(structured_outputs={"grammar": 'root ::= "x" [0-9] [0-9]'}, max_tokens=10),
            _chat(response_format={"type": "json_object"}, max_tokens=20),
            _chat(
                response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}}, max_tokens=40
            ),
        ),
    ),
    Same(name="Priorities (`scheduling_policy='priority'`)", requests=(_complete(priority=3), _complete(priority=-1))),
    Same(
        name="Chunked prefill, prefix caching",
        requests=(_complete(LONG), _complete(LONG), _complete([*LONG, 4, 5, 6])),
        note="latent attention of DeepSeek: not on CPUs",
    ),
    Same(
        name="HTTP: chat, responses, messages, tokenize, detokenize, render, models, load, version, ping",
        requests=(
            _chat(), _chat(logprobs=True, top_logprobs=3),
            ("/v1/responses", {"input": "def main():", "max_output_tokens": 12, "temperature": 0}),
            ("/v1/messages", {"messages": _CHAT, "max_tokens": 12, "temperature": 0}),
            ("/v1/completions/render", {"prompt": "def main("}), ("/v1/chat/completions/render", {"messages": _CHAT}),
            ("/inference/v1/generate", {"token_ids": [4, 5, 6], "sampling_params": {"temperature": 0}}),
            ("/tokenize", {"prompt": "def main("}), ("/detokenize", {"tokens": [5, 9, 13]}),
            ("/v1/models", None), ("/load", None), ("/version", None), ("/ping", None),
        ),
    ),
    Same(
        name="Embeddings, and scores from them (`runner='pooling'`)",
        test="test_features.py::test_embeddings_and_scores_are_those_of_transformers",
    ),
    Same(
        name="KV connectors (`kv_transfer_config`)",
        test="test_features.py::test_a_kv_connector_gives_back_what_it_was_given",
        note="with `ExampleConnector`; others were not tried",
    ),
    Same(
        name="Speculation: `ngram`",
        test="test_features.py::test_ngram_speculation_has_the_same_tokens",
        note="`suffix` is let through, too; vLLM needs the package arctic-inference for it",
    ),
    Same(
        name="Speculation: a draft model, which is vLLM's own",
        test="test_running_engine.py::test_a_draft_model_is_vllms_and_all_its_drafts_are_accepted",
    ),
    Same(
        name="LoRA: PEFT adapters over attention and dense layers",
        test="test_lora.py::test_adapters_have_the_numbers_of_merged_checkpoints",
        note="routed experts and embeddings are refused by name",
    ),
    Same(
        name="Pipeline stages, with tp, ep, and dp outside of them",
        test="test_pipeline.py::test_the_numbers_of_both_references_and_each_stage_its_own_part",
    ),
    Same(
        name="Several nodes: tensor, data and pipeline parallel, headless",
        test="test_nodes.py::test_tensor_parallel_over_two_nodes",
        note="with `titan-bridge serve` a node that ends takes the others with it",
    ),
)  # fmt: skip


def _groups(name: str, said: str, /, **options: Any) -> Refused:
    """An option that does not go with attention data parallelism."""
    titan = {"attention_dp": 2, **options.pop("titan", {})}
    given = {"tensor_parallel_size": 2, "additional_config": {"titan": titan}, **options}
    return Refused(
        name=f"Attention data parallelism with {name}",
        options=given,
        said=f"{said} not supported with attention_dp=2",
    )


_DRAFT = {"model": "MODEL", "num_speculative_tokens": 2}

REFUSED = (
    Refused(
        name="Pipeline stages with `additional_config.titan.dense='shard'`",
        options={
            "pipeline_parallel_size": 2, "data_parallel_size": 2, "additional_config": {"titan": {"dense": "shard"}},
        },
        said="additional_config.titan.dense = 'shard' with pipeline_parallel_size=2 is not supported with",
    ),
    Refused(
        name="Pipeline stages with speculation",
        options={"pipeline_parallel_size": 2, "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        said="speculation (method 'ngram') with pipeline_parallel_size=2 is not supported with model_impl='torchtitan'",
        note="vLLM's own models fail in their first stage",
    ),
    Refused(
        name="LoRA with `fully_sharded_loras`", options={"enable_lora": True, "fully_sharded_loras": True},
        said="fully_sharded_loras is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="LoRA with `enable_mixed_moe_lora_format`",
        options={"enable_lora": True, "enable_mixed_moe_lora_format": True},
        said="enable_mixed_moe_lora_format is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="LoRA with `enable_moe_shared_loras`", options={"enable_lora": True, "enable_moe_shared_loras": True},
        said="enable_moe_shared_loras is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="LoRA with `additional_config.titan.dense='shard'`",
        options={"enable_lora": True, "data_parallel_size": 2, "additional_config": {"titan": {"dense": "shard"}}},
        said="LoRA with additional_config.titan.dense = 'shard' is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="Context parallelism in prefill (`prefill_context_parallel_size`)",
        options={"prefill_context_parallel_size": 2},
        said="prefill_context_parallel_size=2 is not supported with model_impl='torchtitan'; allowed: 1",
    ),
    Refused(
        name="Context parallelism in decode (`decode_context_parallel_size`)",
        options={
            "tensor_parallel_size": 2, "decode_context_parallel_size": 2, "hf_overrides": {"num_key_value_heads": 1},
        },
        said="decode_context_parallel_size=2 is not supported with model_impl='torchtitan'; allowed: 1",
    ),
    Refused(
        name="vLLM's quantized kernels", options={"quantization": "fp8"},
        said="quantization=fp8 is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="Prompt embeddings", options={"enable_prompt_embeds": True},
        said="prompt embeddings are not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="Microbatches (DBO)", options={"enable_dbo": True},
        said="microbatches (enable_dbo) are not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="Expert load balancing (EPLB)", options={"enable_eplb": True},
        said="load balancing is only supported on CUDA devices", note="on CPUs by vLLM, on others by us",
    ),
    Refused(
        name="Weights offloaded to the host", options={"cpu_offload_gb": 1.0},
        said="cpu_offload_gb=1.0 is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="Weights prefetched from the host", options={"offload_group_size": 2},
        said="offload_group_size=2 is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="Classification and reward heads", options={"runner": "pooling", "convert": "classify"},
        said="runner='pooling' (convert='classify') is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="Checkpoints for classification",
        options={"hf_overrides": {"architectures": ["Qwen3ForSequenceClassification"]}},
        said="runner='pooling' (convert='classify') is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="Speculation: `eagle3` and others that need hidden states",
        options={"speculative_config": {"method": "eagle3", **_DRAFT}},
        said="speculative method 'eagle3' is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="`load_format='sharded_state'`", options={"load_format": "sharded_state"},
        said="load_format='sharded_state' is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="`load_format='runai_streamer_sharded'`", options={"load_format": "runai_streamer_sharded"},
        said="load_format='runai_streamer_sharded' is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="`load_format='tensorizer'`", options={"load_format": "tensorizer"},
        said="load_format='tensorizer' is not supported with model_impl='torchtitan'",
    ),
    Refused(
        name="Sleep mode (taken elsewhere)", options={"enable_sleep_mode": True}, by_vllm=True,
        said="Sleep mode is not supported on current platform",
    ),
    _groups("pipeline stages", "pipeline_parallel_size=2 is", pipeline_parallel_size=2),
    _groups("`additional_config.titan.dense='shard'`", "dense = 'shard' is",
            data_parallel_size=2, titan={"dense": "shard"}),
    _groups(
        "speculation", "speculation is", speculative_config={"method": "ngram", "num_speculative_tokens": 2},
    ),
    _groups("LoRA", "LoRA is", enable_lora=True),
    _groups("KV connectors", "a KV connector is",
            kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"}),
    _groups("encoder-cache connectors", "an encoder-cache connector is",
            ec_transfer_config={"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}),
    _groups("a KV cache offloaded to the host", "kv_offloading_size=1.0 is", kv_offloading_size=1.0),
    _groups("KV cache events", "KV cache events are",
            kv_events_config={"enable_kv_cache_events": True, "publisher": "null"}),
    _groups("pooling", "runner='pooling' is", runner="pooling"),
    _groups("Ray and other executors than `mp` and `uni`", "distributed_executor_backend='external_launcher' is",
            distributed_executor_backend="external_launcher"),
    _groups("several nodes", "nnodes=2 is", nnodes=2, node_rank=0, master_addr="127.0.0.1"),
    _groups("a scheduler of your own", "scheduler_cls='vllm.v1.core.sched.scheduler.Scheduler' is",
            scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler"),
    _groups("a worker class of your own", "worker_cls='vllm.v1.worker.cpu_worker.CPUWorker' is",
            worker_cls="vllm.v1.worker.cpu_worker.CPUWorker"),
    _groups("returned routed experts", "enable_return_routed_experts is", enable_return_routed_experts=True),
)  # fmt: skip


def table() -> str:
    """The table as Markdown."""
    rows = [(each.name, "as in vLLM", each.note) for each in SAME]
    rows += [(each.name, "not on CPUs" if each.by_vllm else "refused", each.note) for each in REFUSED]
    lines = [
        "# vLLM's features with TorchTitan's models",
        "",
        "Made by `python -m tests.engine.features` from the table that the tests of the engine run on CPUs.",
        "*As in vLLM*: the same answers as vLLM's own model on the same weights, log-probabilities within 2e-5 in",
        "fp32. *Refused*: with one line when the engine starts. *Not on CPUs*: vLLM itself refuses it there.",
        "What is as in vLLM is so with attention data parallelism, too, but for what is refused with it below.",
        "",
        "| feature | | note |",
        "|---|---|---|",
        *(f"| {name} | {verdict} | {note} |" for name, verdict, note in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(table())
