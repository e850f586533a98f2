"""On real ranks: the DCP that is written loads into TorchTitan's parallel model, and what that saves is read."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torchtitan.components.checkpointer.base import ModelWrapper
from torchtitan.distributed.utils import set_spmd_backend

from tests import lora_samples
from titan_bridge.checkpoint import open_checkpoint
from titan_bridge.checkpoint.reshard import Options, prepare
from titan_bridge.device_meshes import get_device_meshes, to_parallel_dims
from titan_bridge.mesh import DENSE, SPARSE, Sizes
from titan_bridge.models import family_for, load_hf_config
from titan_bridge.models.build import build_on_meta
from titan_bridge.ports import free_port
from titan_bridge.testing import make_checkpoint

pytestmark = pytest.mark.distributed
SECOND = importlib.util.find_spec("torch_checkpointing") is not None
"""Whether the package of TorchTitan's second checkpoint manager is there."""
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
CASES = {
    "llama3": (Sizes(dp=2, tp=2), {"head_dim": 8}),
    "qwen3_moe": (Sizes(dp=2, tp=2, ep=2), {"head_dim": 16}),
}


def parallel_model(hf: dict, sizes: Sizes) -> torch.nn.Module:
    """TorchTitan's model as it trains: tp and ep declared, FSDP around layers, experts on their own mesh."""
    family = family_for(hf)
    plan = family.sharding
    config = family.model_config(hf, expert_bias=True)
    plan.set_sharding(config, enable_ep=sizes.ep > 1)
    set_spmd_backend("partial_dtensor")
    model = build_on_meta(config, dtype=torch.float32)
    model.parallelize(to_parallel_dims(sizes, spmd_backend="partial_dtensor"))
    meshes = get_device_meshes(sizes, device_type="cpu")
    for layer in [*model.layers.values(), model]:
        moe = getattr(layer, "moe", None)
        for module, mesh in ((getattr(moe, "routed_experts", None), SPARSE), (layer, DENSE)):
            if module is not None:
                axis = "efsdp" if mesh == SPARSE else "fsdp"
                fully_shard(
                    module, mesh=meshes[mesh]["dp_replicate", axis], shard_placement_fn=lambda p: Shard(0)
                )
    model.to_empty(device="cpu")
    return model


def on_rank(rank: int, world: int, kind: str, base: Path) -> None:
    with torch.no_grad():
        wrapper = ModelWrapper(parallel_model(load_hf_config(base / "hf"), CASES[kind][0]))
        state = wrapper.state_dict()
        sharded = 0
        for tensor in state.values():
            tensor.zero_()
            sharded += isinstance(tensor, DTensor) and any(p.is_shard() for p in tensor.placements)
        assert sharded > 10
        dcp.load(state, checkpoint_id=base / "dcp")
        wrapper.load_state_dict(state)
        with open_checkpoint(base / "dcp") as checkpoint:
            assert checkpoint.tensors.keys() == state.keys()
            for name, tensor in wrapper.state_dict().items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                assert torch.equal(whole, checkpoint.read(name)), name
        dcp.save({**wrapper.state_dict(), "train_state": {"step": 3}}, checkpoint_id=base / "saved")
        if SECOND:
            save_in_files_of_ranks(base / "second", wrapper.state_dict())


def save_in_files_of_ranks(folder: Path, model: dict[str, torch.Tensor]) -> None:
    """As TorchTitan's second manager is set up, but for its process that writes in the background."""
    from torch_checkpointing import metadata_manager
    from torch_checkpointing.checkpoint_manager import CheckpointManager
    from torch_checkpointing.config import SyncCheckpointSaverConfig
    from torch_checkpointing.default_resharder import DefaultResharder
    from torch_checkpointing.schema import ItemSpec
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    class OnGloo(metadata_manager.DefaultMetadataManager):
        """0.1.1 brings the metadata together in tensors on a GPU."""

        def _all_gather_pickled_data(self, data, process_group=None):
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, data)
            return dict(enumerate(found))

    manager = CheckpointManager.Config(
        items={"model": ItemSpec(resharder=DefaultResharder())},
        save=SyncCheckpointSaverConfig(),
        storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
    ).build()
    manager._metadata_manager.__class__ = OnGloo
    manager.save(str(folder), {"model": model, "train_state": {"step": 3}})
    manager.close()


@pytest.mark.parametrize("kind", CASES)
def test_dcp_loads_into_a_parallel_model_and_its_own_is_read(new_ranks, tmp_path, kind):
    source = make_checkpoint(tmp_path / "hf", kind, tokenizer=False, **SMALL, **CASES[kind][1])
    prepare(Options(source=source, target=tmp_path / "dcp", to="dcp", max_shard_size=200_000)).run()
    new_ranks.run(on_rank, kind, tmp_path)
    assert len(list((tmp_path / "saved").glob("*.distcp"))) == 4
    assert not SECOND or len(list((tmp_path / "second").glob("model_*.pt"))) == 4
    for saved in ("saved", "second") if SECOND else ("saved",):
        back = tmp_path / f"{saved}_back"
        prepare(Options(source=tmp_path / saved, target=back, to="hf", config=source)).run()
        with open_checkpoint(source) as expected, open_checkpoint(back) as found:
            assert expected.tensors.keys() == found.tensors.keys()
            for name in expected.tensors:
                assert torch.equal(expected.read(name), found.read(name)), name


def torchrun(*command: object) -> subprocess.CompletedProcess[str]:
    """A command on two ranks."""
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, command)], capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize("to", ["dcp", "hf"])
def test_torchrun_shares_the_work_and_gives_the_same_tensors(tmp_path, to):
    source = make_checkpoint(tmp_path / "hf", "qwen3_moe", tokenizer=False, **SMALL)
    command = ("-m", "titan_bridge.cli", "reshard", source, tmp_path / "out")
    found = torchrun(*command, "--to", to, "--verify", "--json")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count('"bytes_read"') == 1  # one of them reports
    prepare(Options(source=source, target=tmp_path / "alone", to=to)).run()
    weights = {file.name for kind in ("*.distcp", "*.safetensors") for file in (tmp_path / "out").glob(kind)}
    alone = {file.name for kind in ("*.distcp", "*.safetensors") for file in (tmp_path / "alone").glob(kind)}
    assert len(weights) > len(alone)
    with open_checkpoint(tmp_path / "alone") as one, open_checkpoint(tmp_path / "out") as other:
        assert one.tensors.keys() == other.tensors.keys()
        for name in one.tensors:
            assert torch.equal(one.read(name), other.read(name)), name


def test_a_rank_that_is_done_waits_for_the_slowest(tmp_path):
    """Longer than torch's own limit, which is a few seconds here."""
    source = make_checkpoint(tmp_path / "hf", "llama3", tokenizer=False, **SMALL, head_dim=8)
    script = (
        "import datetime, os, sys, time\n"
        "from torch.distributed import distributed_c10d\n"
        "distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=5)\n"
        "from titan_bridge.checkpoint.execute import Executor\n"
        "real = Executor.run\n"
        "def slow(self): time.sleep(10 * int(os.environ['RANK'])); return real(self)\n"
        "Executor.run = slow\n"
        "from titan_bridge.cli import main\n"
        "sys.exit(main(['reshard', sys.argv[1], sys.argv[2], '--to', 'dcp']))\n"
    )
    (tmp_path / "script.py").write_text(script)
    found = torchrun(tmp_path / "script.py", source, tmp_path / "out")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "out" / ".metadata").is_file()


def test_under_torchrun_one_process_writes_an_adapter(tmp_path):
    model = make_checkpoint(tmp_path / "hf", "llama3", tokenizer=False)
    options = {"seed": 1, "rank": 4, "alpha": 8, "layers": (0, 1), "only": "down_proj"}
    adapter = lora_samples.make_adapter(tmp_path / "adapter", model, **options)
    command = (
        "-m",
        "titan_bridge.cli",
        "reshard",
        adapter,
        tmp_path / "out",
        "--to",
        "dcp",
        "--config",
        model,
    )
    found = torchrun(*command, "--json")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count('"tensors"') == 1
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert len(checkpoint.tensors) == 4


def test_an_error_on_one_rank_ends_all(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama3", tokenizer=False, **SMALL, head_dim=8)
    script = (
        "import os, sys\n"
        "from titan_bridge.checkpoint.execute import Executor\n"
        "if os.environ['RANK'] == '1':\n"
        "    def full(self, *a): raise OSError(28, 'No space left on device')\n"
        "    Executor._write_strip = full\n"
        "from titan_bridge.cli import main\n"
        "sys.exit(main(['reshard', sys.argv[1], sys.argv[2], '--to', 'dcp']))\n"
    )
    (tmp_path / "script.py").write_text(script)
    found = torchrun(tmp_path / "script.py", source, tmp_path / "out")
    assert found.returncode != 0
    assert "titan-bridge: the disk is full" in found.stderr
    assert "titan-bridge: rank 1 failed: the disk is full" in found.stderr
    assert not (tmp_path / "out").exists()
