"""Reinforcement learning in a few minutes on a CPU: TorchTitan's model on two FSDP ranks, a vLLM server beside it.

    python scripts/demo_rl.py              25 steps; makes a small random Qwen3, serves it at tp=2, starts torchrun
    python scripts/demo_rl.py --steps 5    quicker
    torchrun --nproc-per-node 2 scripts/demo_rl.py --train DIR --url http://localhost:8000    the trainer alone

The model is rewarded for even token ids (policy gradient). Before every step the trainer's weights go into the server,
which samples and says how likely each sampled token was; the trainer computes the same from its own weights.
"difference" is the largest between the two: the update is exact if it stays at the noise of float32. Exits 1 if it does
not, or if the reward does not rise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from titan_bridge.ports import free_port
from titan_bridge.reference import load_reference
from titan_bridge.transfer import Trainer

PROMPTS, PROMPT_TOKENS, TOKENS = 16, 8, 16
TOLERANCE = 1e-5


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


def sample(url: str, prompts: list[list[int]], seed: int) -> tuple[list[list[int]], list[list[float]]]:
    """Sampled tokens of each prompt, and their log-probabilities."""
    body = {"model": "policy", "prompt": prompts, "max_tokens": TOKENS, "temperature": 1.0, "logprobs": 0}
    body |= {"ignore_eos": True, "seed": seed, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status().json()
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [c["token_ids"] for c in choices], [c["logprobs"]["token_logprobs"] for c in choices]


def train(directory: str, url: str, steps: int) -> int:
    """One trainer rank, under torchrun."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = sharded_model(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    rewards, worst = [], 0.0
    with Trainer(model, url) as trainer:
        for step in range(steps):
            report = trainer.send(step)
            generator = torch.Generator().manual_seed(step)
            prompts = torch.randint(5, 300, (PROMPTS, PROMPT_TOKENS), generator=generator)
            got = [sample(url, prompts.tolist(), step) if rank == 0 else None]
            dist.broadcast_object_list(got)
            tokens, sampled = (torch.tensor(each) for each in got[0])  # type: ignore[misc]
            mine = slice(rank * PROMPTS // world, (rank + 1) * PROMPTS // world)
            reward = (tokens % 2 == 0).float()
            whole = torch.cat([prompts, tokens], dim=1)[mine]
            logits = model(whole[:, :-1])[:, PROMPT_TOKENS - 1 :].float()
            logprobs = torch.log_softmax(logits, dim=-1).gather(-1, tokens[mine].unsqueeze(-1)).squeeze(-1)
            difference = (logprobs.detach() - sampled[mine]).abs().max()
            dist.all_reduce(difference, op=dist.ReduceOp.MAX)
            advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
            optimizer.zero_grad()
            (-(advantage[mine] * logprobs).mean()).backward()
            optimizer.step()
            rewards.append(reward.mean().item())
            worst = max(worst, difference.item())
            if rank == 0:
                print(
                    f"step {step:2d}  reward {rewards[-1]:.3f}  difference {difference.item():.1e}  "
                    f"update {report.seconds * 1e3:6.1f} ms, engine stopped {report.pause * 1e3:5.1f} ms, "
                    f"{report.kind}, {sum(report.received.values()) / 1e6:.2f} MB",
                    flush=True,
                )
    dist.destroy_process_group()
    third = max(1, steps // 3)
    first, last = sum(rewards[:third]) / third, sum(rewards[-third:]) / third
    if rank == 0:
        print(f"reward {first:.3f} -> {last:.3f}; largest difference {worst:.1e}")
    return int(worst > TOLERANCE or (steps > 2 and last <= first))


def serve_and_train(steps: int) -> int:
    """A server of a small random model, and torchrun of this file."""
    from titan_bridge.testing import make_checkpoint  # noqa: PLC0415  the trainer does not need it

    with tempfile.TemporaryDirectory(prefix="titan-rl-") as folder:
        model = make_checkpoint(Path(folder, "model"), "qwen3", vocab_size=512, std=0.05, dtype=torch.float32)
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "titan_bridge.cli",
            "serve",
            str(model),
            "--tp",
            "2",
            "--port",
            str(port),
        ]
        command += [
            "--enforce-eager",
            "--max-model-len",
            "64",
            "--served-model-name",
            "policy",
            "--dtype",
            "float32",
        ]
        command += ["--weight-transfer-config", json.dumps({"backend": "titan"})]
        with open(Path(folder, "server.log"), "w") as log:
            server = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
            )
        try:
            while True:
                if server.poll() is not None:
                    print(Path(folder, "server.log").read_text(), file=sys.stderr)
                    return 1
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.3)
            run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            run += ["--master-port", str(free_port()), __file__, "--train", str(model)]
            run += ["--url", f"http://127.0.0.1:{port}", "--steps", str(steps)]
            return subprocess.run(run, check=False, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode
        finally:
            server.terminate()
            server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--train", metavar="DIR", help="be a trainer rank of this checkpoint, under torchrun")
    parser.add_argument("--url", default="http://localhost:8000", help="the server, with --train")
    given = parser.parse_args()
    return train(given.train, given.url, given.steps) if given.train else serve_and_train(given.steps)


if __name__ == "__main__":
    sys.exit(main())
