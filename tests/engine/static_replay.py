"""vLLM's GPU compiler on a CPU: `python -m tests.engine.static_replay '[{"name":, "model":, "captures":, ...}, ...]'`.

On GPUs vLLM splits a model's graph at `splitting_ops`, compiles the pieces between them, and captures each as a CUDA
graph, which reads and writes where its tensors lay at the capture. Here the compiler is the same, and a piece that was
called before is called again on the tensors of that first call, so that an input that has moved is as lost as on a GPU.
Several processes that RANK and WORLD_SIZE number are the ranks of one axis, "tp" or "dp". Their cases have "port" and
"axis", then, and "experts": whether they share experts.

Prints one line of JSON for each case; see `run`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

PROMPTS = [[(31 * row + 7 * column) % 200 for column in range(n)] for row, n in enumerate((3, 9, 17))]
TOKENS = 8
READS = {
    "_local_scalar_dense", "bincount", "equal", "histc", "is_nonzero", "masked_select", "nonzero", "nonzero_static",
    "repeat_interleave", "unique_consecutive", "unique_dim", "_unique", "_unique2",
}  # fmt: skip


class RefuseHostReads(TorchDispatchMode):
    """Raises where an operator reads a tensor on the host, moves one to the CPU, or is not torch's or vLLM's own.

    What other libraries' operators do inside is not seen from here; torchtitan's scatter-add synchronises.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func.name().split(".")[0].split("::")
        device = (kwargs or {}).get("device")
        if name in READS or space not in ("aten", "prims", "vllm", "_C", "c10d", "_c10d_functional"):
            raise AssertionError(f"{func.name()} in a CUDA graph")
        if name == "_to_copy" and device is not None and torch.device(device).type == "cpu":
            raise AssertionError("a copy to the host in a CUDA graph")
        return func(*args, **(kwargs or {}))


class Replay:
    """One piece of the graph; captured at its first call for each combination of shapes."""

    inputs = 0
    moved = 0

    def __init__(self, piece: Any) -> None:
        self.piece = piece
        self.captured: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def __call__(self, *args: Any) -> Any:
        shapes = tuple(tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args)
        if shapes not in self.captured:
            with RefuseHostReads():
                self.captured[shapes] = args, self.piece(*args)
            return self.captured[shapes][1]
        places, out = self.captured[shapes]
        for now, then in zip(args, places, strict=True):
            if isinstance(now, torch.Tensor):
                Replay.inputs += 1
                Replay.moved += now.data_ptr() != then.data_ptr()
        for place, value in zip(_tensors(out), _tensors(self.piece(*places)), strict=True):
            place.copy_(value)
        return out


def _tensors(out: Any) -> list[torch.Tensor]:
    values = out if isinstance(out, tuple | list) else [out]
    return [value for value in values if isinstance(value, torch.Tensor)]


def pulled_back(nodes: list[fx.Node], pieces: list[int]) -> list[str]:
    """Nodes that vLLM puts into an earlier piece than a node before them."""
    latest = accumulate(pieces, max)
    return [node.name for node, piece, so_far in zip(nodes, pieces, latest, strict=True) if piece < so_far]


@contextmanager
def gpu_compiler(found: dict[str, Any], *, captures: bool) -> Iterator[None]:
    """Let this process's CPU compile and capture as a GPU does; `captures` leaves routed experts inside of graphs.

    Those are split but not compiled: vLLM's pass for operators that write into an argument names operators that its
    CPU build does not have.
    """
    from torch.fx.passes import split_module as splitting
    from vllm.compilation import backends
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.platforms.cpu import CpuPlatform

    check, split = CpuPlatform.check_and_update_config, splitting.split_module
    all_reduce = CpuCommunicator.all_reduce

    def check_and_update_config(cls: type, config: Any) -> None:
        compilation = config.compilation_config
        mode = compilation.mode
        check(config)
        compilation.mode, compilation.compile_sizes = mode, []
        if captures:
            compilation.backend = "eager"

    def split_module(
        graph: fx.GraphModule, root: Any, piece_of: Callable[[fx.Node], int], **options: Any
    ) -> Any:
        nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
        pieces = [piece_of(node) for node in nodes]
        found.update(pieces=len(set(pieces)), pulled_back=pulled_back(nodes, pieces))
        found["all_reduces"] = sum("vllm.all_reduce" in str(node.target) for node in nodes)
        return split(graph, root, piece_of, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
        patch.setattr(CpuPlatform, "support_static_graph_mode", classmethod(lambda cls: not captures))
        # As on GPUs: collectives are operators of vLLM's, which leave their input as it is.
        patch.setattr(CpuPlatform, "use_custom_op_collectives", classmethod(lambda cls: True))
        patch.setattr(CpuCommunicator, "all_reduce", lambda self, x: all_reduce(self, x.clone()))
        patch.setattr(splitting, "split_module", split_module)
        patch.setattr(backends, "wrap_with_cudagraph_if_needed", lambda piece, *_: Replay(piece))
        yield


def run(case: dict[str, Any]) -> dict[str, Any]:
    """What came out: tokens and log-probabilities, replayed and eager, and how the graph was split and replayed."""
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    found: dict[str, Any] = {"name": case["name"]}
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    launched = {
        "distributed_executor_backend": "external_launcher",
        "enable_expert_parallel": case["experts"],
    }
    launched[{"tp": "tensor_parallel_size", "dp": "data_parallel_size"}[case["axis"]]] = ranks
    os.environ["MASTER_PORT"] = str(
        case.get("port")
    )  # a store of its own: the last case's groups are in the old one
    Replay.inputs = Replay.moved = 0
    with gpu_compiler(found, captures=case["captures"]):
        llm = vllm.LLM(
            case["model"],
            model_impl="torchtitan",
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=64,
            max_num_seqs=4,
            kv_cache_memory_bytes=8 << 20,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **(launched if ranks > 1 else {}),
        )
        found["modules"] = llm.apply_model(lambda model: sorted({type(m).__name__ for m in model.modules()}))[
            0
        ]
        answers(llm)  # captures
        found["replayed"] = answers(llm)
        found |= {"inputs": Replay.inputs, "moved": Replay.moved}
        found["splitting_ops"] = llm.llm_engine.vllm_config.compilation_config.splitting_ops
        llm.apply_model(lambda model: setattr(model, "do_not_compile", True))
        found["eager"] = answers(llm)
    assert Replay.inputs == found["inputs"], "the eager model ran a compiled piece"
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return found


def answers(llm: Any) -> list[Any]:
    """Token ids and log-probabilities for each of `PROMPTS`."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
    rows = [(out.outputs[0].token_ids, out.outputs[0].logprobs) for out in outputs]
    return [[list(ids), [each[t].logprob for each, t in zip(probs, ids, strict=True)]] for ids, probs in rows]


if __name__ == "__main__":
    for each in json.loads(sys.argv[1]):
        found = run(each)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found), flush=True)
