"""Reinforcement learning in a few minutes on a CPU: TorchTitan trains on two FSDP ranks, vLLM samples at tp=2.

    python scripts/demo_rl.py              25 steps
    python scripts/demo_rl.py --steps 5    quicker
    python scripts/demo_rl.py --sparse     after the first step, send what changed instead of everything

A small random Qwen3 is rewarded for even token ids (policy gradient). Before every step its weights go from the
trainer's shards into the engine's; the engine samples, and says how likely each sampled token was; the trainer
computes the same from its own weights. "difference" is the largest between the two: the sync is exact if it stays at
the noise of float32. Exits 1 if it does not, or if the reward does not rise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from vllm import LLM, SamplingParams

from titan_bridge.config.schema import InferConfig, Parallel
from titan_bridge.engine.run.offline import engine
from titan_bridge.engine.transfer import LLMClient
from titan_bridge.reference import load_reference
from titan_bridge.testing import make_checkpoint
from titan_bridge.transfer import Options, Snapshot, TensorSource, Trainer, changed
from titan_bridge.transfer.plain import PlainClient, door, free_port, plain_ranks

TRAINERS, TP = 2, 2
PROMPTS, PROMPT_TOKENS, TOKENS = 16, 8, 16
LEARNING_RATE = 2e-3
TOLERANCE = 1e-5


class Rollouts(LLMClient):
    """The engine as the trainer sees it: weight updates, and `sample`."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(llm)
        self.llm = llm

    def sample(self, prompts: list[list[int]], seed: int) -> tuple[list[list[int]], list[list[float]]]:
        """Sampled tokens of each prompt and their log-probabilities."""
        given = [
            SamplingParams(
                max_tokens=TOKENS, temperature=1.0, logprobs=0, ignore_eos=True, seed=seed * len(prompts) + i
            )
            for i in range(len(prompts))
        ]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], given, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        logprobs = [
            [row[token].logprob for row, token in zip(output.outputs[0].logprobs, own, strict=True)]
            for output, own in zip(outputs, tokens, strict=True)
        ]
        return tokens, logprobs


def sharded_model(directory: str) -> torch.nn.Module:
    """TorchTitan's model with the checkpoint's weights in float32, each layer sharded over the trainer's ranks."""
    model = load_reference(directory).model.train().requires_grad_(True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    for module in [*model.layers.values(), model]:
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model


def train(
    rank: int, world: int, port: int, directory: str, client: PlainClient, steps: int, sparse: bool
) -> list[tuple[float, float]]:
    """One trainer rank; returns (reward, difference) of each step."""
    torch.manual_seed(0)
    model = sharded_model(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    source = TensorSource(model, rank=rank)
    trainer = Trainer(source, client, rank=rank, world=world, options=Options(port=port, seconds=120))
    trainer.connect()
    before: Snapshot | None = None
    history = []
    for step in range(steps):
        if before is None:
            report = trainer.send_weights(step)
        else:
            report = trainer.send_sparse(changed(before, source.tensors(), rank=rank), step)
        if sparse:
            before = trainer.snapshot()
        prompts = torch.randint(
            5, 300, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(step)
        )
        got: list[Any] = [client.call("sample", prompts.tolist(), step)[0] if rank == 0 else None]
        dist.broadcast_object_list(got)
        tokens, sampled = torch.tensor(got[0][0]), torch.tensor(got[0][1])
        mine = slice(rank * PROMPTS // world, (rank + 1) * PROMPTS // world)
        reward = (tokens % 2 == 0).float()
        whole = torch.cat([prompts, tokens], dim=1)[mine]
        logits = model(whole[:, :-1])[:, PROMPT_TOKENS - 1 :]
        logprobs = (
            torch.log_softmax(logits.float(), dim=-1).gather(-1, tokens[mine].unsqueeze(-1)).squeeze(-1)
        )
        difference = (logprobs.detach() - sampled[mine]).abs().max()
        dist.all_reduce(difference, op=dist.ReduceOp.MAX)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        loss = -(advantage[mine] * logprobs).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((reward.mean().item(), difference.item()))
        if rank == 0:
            sent = sum(report.received.values()) / 1e6
            print(
                f"step {step:2d}  reward {history[-1][0]:.3f}  difference {history[-1][1]:.1e}  "
                f"sync {report.seconds * 1e3:6.1f} ms, {report.kind}, {sent:.2f} MB",
                flush=True,
            )
    trainer.shutdown()
    return history


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--sparse", action="store_true", help="send patches after the first step")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="titan-rl-") as folder:
        model = make_checkpoint(Path(folder, "model"), "qwen3", vocab_size=512, std=0.05, dtype=torch.float32)
        config = InferConfig(
            model=str(model),
            dtype="float32",
            max_model_len=64,
            parallel=Parallel(tp=TP),
            vllm={"enforce_eager": True, "weight_transfer_config": {"backend": "titan"}},
        )
        with (
            engine(config) as (llm, _, loading),
            door(Rollouts(llm), f"{folder}/door") as client,
            plain_ranks(TRAINERS) as ranks,
        ):
            print(f"engine ready after {loading:.0f} s", flush=True)
            job = (train, free_port(), str(model), client, given.steps, given.sparse)
            history = ranks.run(*job)[0]
    worst = max(difference for _, difference in history)
    third = max(1, len(history) // 3)
    first = sum(reward for reward, _ in history[:third]) / third
    last = sum(reward for reward, _ in history[-third:]) / third
    print(
        f"reward {first:.3f} -> {last:.3f}; largest difference {worst:.1e}; {time.monotonic() - started:.0f} s"
    )
    if worst > TOLERANCE:
        print(f"the engine's log-probabilities differ from the trainer's by more than {TOLERANCE:g}")
        return 1
    if len(history) > 2 and last <= first:
        print("the reward did not rise")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
