"""Updates of a real engine: what it answers afterwards is what an engine started from those weights answers, bit for
bit; after a fault it answers as before."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_bridge.sharding.layout import Layout
from titan_bridge.transfer.changes import Snapshot, changed
from titan_bridge.transfer.errors import TransferError
from titan_bridge.transfer.options import Options
from titan_bridge.transfer.plain import PlainClient, PlainRanks, door, free_port, plain_ranks
from titan_bridge.transfer.samples import local_part
from titan_bridge.transfer.source import TensorSource
from titan_bridge.transfer.trainer import Trainer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

SIZES = {"hidden_size": 64, "vocab_size": 777, "num_hidden_layers": 2}


class Engine:
    """A running engine; `client` reaches it from other processes."""

    def __init__(self, llm: Any, client: PlainClient, folder: Path) -> None:
        self.llm, self.client, self.folder = llm, client, folder
        self.fresh = self.answers()

    def answers(self) -> list[float]:
        """Log-probabilities of the tokens of a prompt and of its greedy continuation."""
        from vllm import SamplingParams

        given = SamplingParams(max_tokens=6, temperature=0, prompt_logprobs=0, logprobs=0, ignore_eos=True)
        prompt = {"prompt_token_ids": list(range(7, 47))}
        (output,) = self.llm.generate([prompt], given, use_tqdm=False)
        rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        return [next(iter(row.values())).logprob for row in rows]


def titan_tensors(model: Path) -> dict[str, torch.Tensor]:
    """The checkpoint as TorchTitan's global tensors."""
    from titan_bridge.layout import specs
    from titan_bridge.mesh import Sizes
    from titan_bridge.models import family_for, load_hf_config

    hf = load_hf_config(model)
    whole = {fqn: torch.zeros(known.shape, dtype=known.dtype) for fqn, known in specs(hf, Sizes()).items()}
    for view in family_for(hf).views(hf):
        view.write(whole[view.fqn], load_file(model / "model.safetensors")[view.name])
    return whole


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A mixture of experts in bf16 at tp=2, ep=2, started from checkpoint a; a, b and their layout as files."""
    from titan_bridge.config.schema import InferConfig, Parallel
    from titan_bridge.engine.offline import engine as start
    from titan_bridge.engine.transfer import LLMClient
    from titan_bridge.layout import layout
    from titan_bridge.mesh import Sizes
    from titan_bridge.models import load_hf_config
    from titan_bridge.testing import make_checkpoint

    folder = tmp_path_factory.mktemp("transfer")
    for seed, name in enumerate("ab"):
        make_checkpoint(folder / name, "qwen3_moe", seed=seed, dtype=torch.bfloat16, **SIZES)
        save_file(titan_tensors(folder / name), folder / f"{name}.safetensors")
    # The trainer's vocabulary is not padded; the engine's is.
    layout(load_hf_config(folder / "a"), Sizes(dp=2), "shard").write(folder / "trainer.json")
    config = InferConfig(
        model=str(folder / "a"),
        parallel=Parallel(tp=2, ep=2),
        max_model_len=128,
        vllm={"enforce_eager": True, "weight_transfer_config": {"backend": "titan"}},
    )
    with start(config) as (llm, _, _), door(LLMClient(llm), str(folder / "door")) as client:
        yield Engine(llm, client, folder)


@pytest.fixture(scope="module")
def trainers() -> Iterator[PlainRanks]:
    with plain_ranks(2) as ranks:
        yield ranks


def test_weights_by_hugging_face_names_through_vllms_own_factory(engine):
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from titan_bridge.engine.transfer import LLMClient, TitanTrainerInitInfo, TitanWeightSource

    held = load_file(engine.folder / "b" / "model.safetensors")
    trainer = WeightTransferTrainerFactory.trainer_init(
        TitanTrainerInitInfo(rank=0, timeout_seconds=30),
        client=LLMClient(engine.llm),
        source=TitanWeightSource(lambda: held),
    )
    trainer.send_weights()
    assert engine.answers() != engine.fresh
    assert engine.llm.get_weight_version() == "1"
    held = load_file(engine.folder / "a" / "model.safetensors")
    trainer.send_weights("from a")
    assert engine.answers() == engine.fresh
    assert engine.llm.get_weight_version() == "from a"
    assert sum(trainer.report.received.values()) == trainer.report.lower_bound
    trainer.shutdown()


def fsdp(folder: Path, name: str, rank: int) -> dict[str, torch.Tensor]:
    """fp32 masters of a checkpoint as DTensors of two FSDP ranks."""
    told = Layout.read(folder / "trainer.json")
    mesh = {
        key: DeviceMesh("cpu", torch.tensor(m.array), mesh_dim_names=m.axes) for key, m in told.meshes.items()
    }
    return {
        fqn: DTensor.from_local(
            local_part(whole.float(), told, fqn, rank),
            mesh[told.params[fqn].spec.mesh],
            told.params[fqn].spec.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        for fqn, whole in load_file(folder / f"{name}.safetensors").items()
    }


def connect(
    rank: int, world: int, port: int, engine: PlainClient, held: dict, seconds: float = 30
) -> Trainer:
    options = Options(port=port, seconds=seconds, bucket_bytes=2**14)
    trainer = Trainer(TensorSource(lambda: held, rank=rank), engine, rank=rank, world=world, options=options)
    trainer.connect()
    return trainer


def dense_there_and_back(rank: int, world: int, port: int, client: PlainClient, folder: Path) -> None:
    held = fsdp(folder, "b", rank)
    trainer = connect(rank, world, port, client, held)
    trainer.send_weights()
    held |= fsdp(folder, "a", rank)
    trainer.send_weights()
    trainer.shutdown()


def test_two_fsdp_ranks_send_fp32_masters(engine, trainers):
    trainers.run(dense_there_and_back, free_port(), engine.client, engine.folder)
    assert engine.answers() == engine.fresh


def send(rank: int, world: int, port: int, client: PlainClient, folder: Path, how: str) -> int:
    """From a to a little away from a, and how many elements that are."""
    held = fsdp(folder, "a", rank)
    trainer = connect(rank, world, port, client, held)
    trainer.send_weights()
    before = Snapshot(held, dtype=torch.bfloat16)
    for tensor in held.values():
        local = tensor.to_local()
        local.view(-1)[::23] *= 1.5
    patches = changed(before, held, rank=rank)
    if how == "sparse":
        trainer.send_sparse(patches)
    elif how == "dense":
        trainer.send_weights()
    else:  # back to a, by patches
        trainer.send_weights()
        there = Snapshot(held, dtype=torch.bfloat16)
        trainer.send_sparse(changed(there, fsdp(folder, "a", rank), rank=rank))
    trainer.shutdown()
    return sum(len(patch.indices) for patch in patches)


def test_patches_and_whole_weights_give_the_same_answers(engine, trainers):
    entries = trainers.run(send, free_port(), engine.client, engine.folder, "sparse")
    assert min(entries) > 1000
    sparse = engine.answers()
    assert sparse != engine.fresh
    trainers.run(send, free_port(), engine.client, engine.folder, "dense")
    assert engine.answers() == sparse
    trainers.run(send, free_port(), engine.client, engine.folder, "back")
    assert engine.answers() == engine.fresh


class Fatal(dict):
    """Local tensors that kill the process when the fifth is taken for sending."""

    left = 5

    def __getitem__(self, name: str) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(name)


class FatalSource(TensorSource):
    def local(self) -> dict[str, torch.Tensor]:
        return Fatal(super().local())


def dies(rank: int, world: int, port: int, client: PlainClient, folder: Path, victim: int) -> None:
    held = fsdp(folder, "b", rank)
    trainer = connect(rank, world, port, client, held, seconds=8)
    if rank == victim:
        trainer.source = FatalSource(lambda: held, rank=rank)
    with pytest.raises(TransferError):
        trainer.send_weights()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_trainer_that_is_killed_leaves_the_old_weights(engine, trainers, victim):
    with plain_ranks(2) as mortal, pytest.raises(RuntimeError, match=f"rank {victim}: died"):
        mortal.run(dies, free_port(), engine.client, engine.folder, victim)
    assert engine.answers() == engine.fresh
    trainers.run(dense_there_and_back, free_port(), engine.client, engine.folder)
    assert engine.answers() == engine.fresh
