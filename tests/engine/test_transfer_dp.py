"""Updates of a real engine of two dp ranks with expert parallelism and sharded dense weights, from a trainer of FSDP 2
x TP 2: both ranks take one together, and answer afterwards as the engine that was started from those weights."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from titan_bridge.ports import free_port
from titan_bridge.sharding.layout import Layout
from titan_bridge.testing_processes import PlainClient, plain_ranks
from titan_bridge.testing_samples import as_dtensors, local_part
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.trainer import Trainer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

DP = 2


def serve(model: str, address: str, dense: str) -> None:
    """Body of one dp rank's process: an engine behind a door."""
    from titan_bridge.config.schema import InferConfig, Parallel
    from titan_bridge.engine.run.offline import engine
    from titan_bridge.engine.transfer import LLMClient
    from titan_bridge.testing_processes import door

    class Rank(LLMClient):
        def answers(self) -> list[float]:
            """Log-probabilities of a prompt's tokens and of its greedy continuation."""
            from vllm import SamplingParams

            given = SamplingParams(
                max_tokens=6, temperature=0, prompt_logprobs=0, logprobs=0, ignore_eos=True
            )
            prompt = {"prompt_token_ids": list(range(7, 47))}
            (output,) = self._llm.generate([prompt], given, use_tqdm=False)
            rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            return [next(iter(row.values())).logprob for row in rows]

    config = InferConfig(
        model=model,
        parallel=Parallel(dp=DP, ep=DP, dense=dense),  # type: ignore[arg-type]
        max_model_len=128,
        vllm={"enforce_eager": True, "weight_transfer_config": {"backend": "titan"}},
    )
    with engine(config) as (llm, _, _), door(Rank(llm), address):
        Path(f"{address}.ready").touch()
        sys.stdin.read()  # until the test is over
        os._exit(0)  # the engines of dp ranks do not shut down one by one


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PlainClient, Path]]:
    from titan_bridge import cpu
    from titan_bridge.engine.run.ranks import end_group, rank_environment
    from titan_bridge.mesh import Sizes
    from titan_bridge.model_layout import layout
    from titan_bridge.models import load_hf_config
    from titan_bridge.testing import make_checkpoint, titan_tensors

    folder = tmp_path_factory.mktemp("dp")
    for seed, name in enumerate("ab"):
        make_checkpoint(
            folder / name, "qwen3_moe", seed=seed, dtype=torch.bfloat16, hidden_size=64, tokenizer=False
        )
        save_file(titan_tensors(folder / name), folder / f"{name}.safetensors")
    layout(load_hf_config(folder / "a"), Sizes(dp=2, tp=2), "shard").write(folder / "trainer.json")
    common = {**os.environ, **cpu.environment(DP, given=os.environ)}
    port = free_port()
    addresses = [str(folder / f"door{rank}") for rank in range(DP)]
    code = "import sys; from tests.engine.test_transfer_dp import serve; serve(*sys.argv[1:])"
    started: list[Any] = []
    try:
        for rank, address in enumerate(addresses):
            environment = {**common, **rank_environment(common, rank, DP, 1, port, lockstep=True)}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, str(folder / "a"), address, "shard"],
                    stdin=subprocess.PIPE,
                    env=environment,
                    process_group=0,
                )
            )
        while not all(Path(f"{address}.ready").exists() for address in addresses):
            assert all(process.poll() is None for process in started), "a dp rank did not start"
            time.sleep(0.1)
        yield PlainClient(addresses), folder
    finally:
        for process in started:
            end_group(process)


def sharded(folder: Path, name: str, rank: int) -> dict[str, torch.Tensor]:
    """A checkpoint as DTensors of the trainer."""
    told = Layout.read(folder / "trainer.json")
    read = load_file(folder / f"{name}.safetensors")
    return as_dtensors({fqn: local_part(whole, told, fqn, rank) for fqn, whole in read.items()}, told)


def there_and_back(rank: int, world: int, client: PlainClient, folder: Path) -> list[list[list[float]]]:
    held = sharded(folder, "b", rank)
    trainer = Trainer(lambda: held, client, options=Options(seconds=60))
    trainer.connect()
    answers = []
    for name in "bab":
        held.update(sharded(folder, name, rank))
        report = trainer.send(whole=True)
        if rank == 0:
            assert sum(report.received.values()) == report.lower_bound
            answers.append(client.call("answers"))
    trainer.close()
    return answers


def test_both_dp_ranks_take_an_update_together(ranks):
    client, folder = ranks
    fresh = client.call("answers")
    assert fresh[0] == fresh[1]
    with plain_ranks(4) as trainers:
        (b, a, again), *_ = trainers.run(there_and_back, client, folder)
    assert b[0] == b[1] != fresh[0]
    assert a == fresh
    assert again == b
