"""vLLM's Triton kernel for routed experts on a CPU: `python -m tests.engine.triton_interpreter` prints a line of JSON.

Triton's interpreter runs the kernel as it is; its products of bfloat16 are wrong, so float16 stands for that.
vLLM takes Triton on CPUs only with a backend of that name, and its CPU build lacks the operator that says where rows
go: here it has a form for CPUs, after what vLLM says of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import triton.backends
from torch import nn
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

EXPERTS, TOP_K, DIM, HIDDEN = 16, 3, 64, 48
FIRST, COUNT = 4, 8
"""The experts of one rank of several."""


def use_interpreter() -> None:
    """Before vLLM is imported."""
    triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))
    library = torch.library.Library("_moe_C", "FRAGMENT")
    library.define(
        "moe_align_block_size(Tensor ids, int experts, int block, Tensor(a!) places, Tensor(b!) blocks, "
        "Tensor(c!) padded, Tensor? own, Tensor? scatter) -> ()"
    )
    library.impl("moe_align_block_size", align, "CPU")
    globals()["_library"] = library  # as long as this is held


def align(
    ids: torch.Tensor,
    experts: int,
    block: int,
    places: torch.Tensor,
    blocks: torch.Tensor,
    padded: torch.Tensor,
    own: torch.Tensor | None,
    scatter: torch.Tensor | None,
) -> None:
    """Places in `ids` by expert, each expert's filled up to whole blocks with none; and the expert of each block."""
    assert scatter is None
    where = torch.arange(experts) if own is None else own
    here = where[ids.flatten()]
    at = 0
    places.fill_(ids.numel())
    blocks.fill_(-(2**31))  # to be read by nobody
    for expert in here.unique().tolist():
        if expert >= 0:
            found = (here == expert).nonzero().flatten()
            count = -(-len(found) // block)
            places[at * block : at * block + len(found)] = found
            blocks[at : at + count] = expert
            at += count
    padded.fill_(at * block)


def experts(kind: str, *, own: bool, dtype: torch.dtype) -> Any:
    """`RoutedExperts` of all experts or of a rank's own, as the engine makes them before a kernel is chosen."""
    from titan_bridge.engine.model.moe import OwnExpertsDispatcher, TopKSumDispatcher
    from titan_bridge.models.experts import KeepDtypeGroupedExperts
    from titan_bridge.models.gpt_oss_experts import KeepDtypeGptOssExperts

    torch.manual_seed(0)
    dispatcher = LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K)
    cls = {"swiglu": KeepDtypeGroupedExperts, "gpt-oss": KeepDtypeGptOssExperts}[kind]
    inner = cls.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS)
    held = RoutedExperts.Config(inner_experts=inner, token_dispatcher=dispatcher).build()
    for parameter in held.parameters():
        nn.init.normal_(parameter, std=0.2)
    held.to(dtype)
    if kind == "gpt-oss":
        held.inner_experts.tp_degree = 1 if own else 2  # the second bias is shared by tp ranks
    if own:
        for name, parameter in list(held.inner_experts.named_parameters()):
            part = nn.Parameter(parameter[FIRST : FIRST + COUNT].data)
            held.inner_experts.register_parameter(name, part)
        held.token_dispatcher = OwnExpertsDispatcher(held.token_dispatcher, first=FIRST, count=COUNT)
    else:
        held.token_dispatcher.__class__ = TopKSumDispatcher
    return held


def routed(kind: str, *, own: bool, dtype: torch.dtype, tokens: int) -> dict[str, float]:
    """How far the kernel's result is from float32's, over its largest number, and TorchTitan's own from the same."""
    from vllm.config import CompilationConfig

    from titan_bridge.engine.model.moe import ServedExperts
    from titan_bridge.engine.model.triton_experts import use_triton

    held = experts(kind, own=own, dtype=dtype)
    options: dict[str, Any] = {"name": "a", "layer_id": 0, "token_share": None, "outside_graphs": False}
    served = ServedExperts(held, compilation=CompilationConfig(), **options)
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, DIM, generator=generator).to(dtype)
    scores_TK, ids_TK = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    given = x_TD, scores_TK, ids_TK, torch.bincount(ids_TK.flatten(), minlength=EXPERTS)
    theirs_TD = served.run(*given)
    use_triton(served.inner_experts, routes=True)
    ours_TD = served.run(*given)
    exact = experts(kind, own=own, dtype=dtype).float()
    wanted_TD = ServedExperts(exact, compilation=CompilationConfig(), **options).run(x_TD.float(), *given[1:])
    assert (ours_TD.dtype, ours_TD.shape) == (dtype, x_TD.shape)
    scale = wanted_TD.abs().max() if tokens else torch.tensor(1.0)
    return {
        name: max(((each_TD.float() - wanted_TD).abs() / scale).flatten().tolist(), default=0.0)
        for name, each_TD in (("ours", ours_TD), ("theirs", theirs_TD))
    }


def sorted_rows(kind: str) -> float:
    """The same of rows sorted by expert, as an all-to-all brings them: some experts have none, and some rows none."""
    from titan_bridge.engine.model.triton_experts import use_triton

    inner = experts(kind, own=True, dtype=torch.float32).inner_experts
    counts_E = torch.tensor([3, 0, 20, 1, 0, 0, 7, 2])
    rows = int(counts_E.sum())
    x_RD = torch.randn(rows + 5, DIM)
    wanted_RD = inner(x_RD, counts_E)[:rows]
    use_triton(inner, routes=False)
    assert not inner.in_one(1.0)
    assert inner(x_RD[:0], counts_E * 0).shape == (0, DIM)
    return ((inner(x_RD, counts_E)[:rows] - wanted_RD).abs().max() / wanted_RD.abs().max()).item()


def run() -> Iterator[tuple[str, Any]]:
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_moe_kernel

    yield "kernel", type(fused_moe_kernel).__name__
    for kind in ("swiglu", "gpt-oss"):
        yield f"{kind}, sorted", sorted_rows(kind)
        for own in (False, True):
            for dtype in (torch.float32, torch.float16):
                for tokens in (0, 1, 5, 70):
                    name = f"{kind}, {'own' if own else 'all'}, {dtype}, {tokens}"
                    yield name, routed(kind, own=own, dtype=dtype, tokens=tokens)


if __name__ == "__main__":
    use_interpreter()
    with torch.inference_mode():
        print(json.dumps(dict(run())))
