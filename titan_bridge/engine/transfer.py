"""Weight transfer backend "titan" for vLLM's framework: `weight_transfer_config={"backend": "titan"}`.

Both halves are thin: what happens is in `titan_bridge.transfer`. When the worker's half raises is said in
`transfer.receiver`; the trainer's half raises TransferError with what a worker said. Without vLLM on the trainer's
side, `titan_bridge.transfer` does the same.

    engine = WeightTransferTrainerFactory.trainer_init(
        TitanTrainerInitInfo(rank=rank, world=2, master_address="10.0.0.1", master_port=29600),
        client=titan_bridge.transfer.HTTPClient("http://engine:8000"),
        source=TitanWeightSource(model, rank=rank),
    )
    engine.send_weights()        # on every trainer rank, after every step
    engine.send_sparse(patches)  # or only what changed
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    ModuleSource,
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    materialize_full_tensor,
)

from titan_bridge.engine.transfer_target import target_of
from titan_bridge.errors import BridgeError
from titan_bridge.transfer.lanes import BUCKET_BYTES
from titan_bridge.transfer.options import Options, PauseMode, Report
from titan_bridge.transfer.payload import Terms, Update, parsed
from titan_bridge.transfer.receiver import Receiver
from titan_bridge.transfer.source import Tensors, TensorSource
from titan_bridge.transfer.sparse import Patch
from titan_bridge.transfer.trainer import Trainer
from titan_bridge.transfer.transport import Backend

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import VllmConfig


# The worker's half


@dataclass
class TitanInitInfo(WeightTransferInitInfo):
    terms: Terms


@dataclass
class TitanUpdateInfo(WeightTransferUpdateInfo):
    update: Update


class TitanWeightTransferEngine(WeightTransferEngine[TitanInitInfo, TitanUpdateInfo]):
    """Receives exactly the slices that this worker holds; see `transfer.receiver` for what is promised."""

    init_info_cls = TitanInitInfo
    update_info_cls = TitanUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.receiver = Receiver(target_of(model, vllm_config))

    def parse_init_info(self, init_dict: dict[str, Any]) -> TitanInitInfo:
        return TitanInitInfo(terms=parsed(Terms, "init_info", init_dict))

    def parse_update_info(self, update_dict: dict[str, Any]) -> TitanUpdateInfo:
        return TitanUpdateInfo(update=parsed(Update, "update_info", update_dict))

    def init_transfer_engine(self, init_info: TitanInitInfo) -> None:
        self.receiver.connect(init_info.terms)

    def start_weight_update(self) -> None:
        self.receiver.begin()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Without the base's synchronisation of the device: nothing live is written here.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: TitanUpdateInfo) -> None:
        self.receiver.update(update_info.update)

    @torch.no_grad()
    def finish_weight_update(self) -> None:
        self.receiver.finish()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        self.receiver.shutdown()


# The trainer's half


class TitanWeightSource(WeightSource):
    """The weights of one trainer rank: a TorchTitan model, or DTensors and tensors by name; see `TensorSource`."""

    def __init__(
        self, tensors: nn.Module | Tensors | Callable[[], Tensors], *, rank: int | None = None
    ) -> None:
        """`rank`: of this trainer rank, as DTensors' meshes count; else that of the default process group, or 0."""
        if rank is None:
            rank = dist.get_rank() if dist.is_initialized() else 0
        self.tensors = TensorSource(tensors, rank=rank)

    def metadata(self) -> list[ParamMeta]:
        """Of the tensors that this rank knows; global shapes, nothing is gathered."""
        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self.tensors.tensors().items()]

    def held_names(self) -> Collection[str]:
        return list(self.tensors.tensors())

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Gathered tensors, for vLLM's other backends; "titan" never gathers."""
        for name, tensor in self.tensors.tensors().items():
            yield name, materialize_full_tensor(tensor)


@dataclass
class TitanTrainerInitInfo(TrainerInitInfo):
    """How a trainer rank takes part; the fields of `transfer.trainer.Options`, under vLLM's names where it has some."""

    backend: ClassVar[str] = "titan"

    world: int = 1
    """Trainer ranks."""
    master_address: str = "127.0.0.1"
    """Of trainer rank 0, as the other ranks and all workers reach it."""
    master_port: int = 0
    """0 takes a free one; for trainers of one rank."""
    timeout_seconds: float = 300.0
    """Of a connection, and of one update."""
    bucket_bytes: int = BUCKET_BYTES
    """Most bytes of one message; a sender holds two."""
    transport: Backend = "gloo"
    """ "gloo" through the hosts' memory, "nccl" between GPUs."""
    workers: int | None = None
    """Workers of each engine, for dense models with vLLM's data parallelism, whose workers cannot know."""
    pause: PauseMode | None = "keep"
    """vLLM's pause mode for requests in flight while an update becomes live, where the client can pause."""


class TitanTrainerWeightTransferEngine(TrainerWeightTransferEngine[TitanTrainerInitInfo]):
    """One trainer rank: `trainer_init`, then `send_weights` and `send_sparse` on all ranks together."""

    init_info_cls = TitanTrainerInitInfo

    def __init__(self, *, client: Any, source: WeightSource | None, info: TitanTrainerInitInfo) -> None:
        super().__init__(client=client, source=source, is_sender=info.is_sender)
        self.trainer = Trainer(
            _tensors_of(source, info.rank),
            client,
            rank=info.rank,
            world=info.world,
            options=Options(
                host=info.master_address,
                port=info.master_port,
                seconds=info.timeout_seconds,
                bucket_bytes=info.bucket_bytes,
                backend=info.transport,
                workers=info.workers,
                pause=info.pause,
            ),
        )
        self.report: Report | None = None
        """Of the last update."""

    @classmethod
    def trainer_init(
        cls, init_info: TitanTrainerInitInfo, *, client: Any, source: WeightSource | None = None
    ) -> TitanTrainerWeightTransferEngine:
        """Meet the engine and make the plan.

        Raises:
            BridgeError: The two sides do not fit together, or no source.
            TransferError: The engine is busy with another trainer, or somebody did not come within the time.
        """
        engine = cls(client=client, source=source, info=init_info)
        engine.trainer.connect()
        return engine

    def send_weights(self, version: str | int | None = None) -> None:
        """Send all weights; returns when they are served. See `Trainer.send_weights`."""
        self.report = self.trainer.send_weights(version)

    def send_sparse(
        self, patches: Iterable[Patch], version: str | int | None = None, *, base: str | None = None
    ) -> None:
        """Send changed elements only. See `Trainer.send_sparse`."""
        self.report = self.trainer.send_sparse(patches, version, base=base)

    def shutdown(self) -> None:
        """Leave the engine to another trainer."""
        self.trainer.shutdown()


def _tensors_of(source: WeightSource | None, rank: int) -> TensorSource:
    if isinstance(source, TitanWeightSource):
        return source.tensors
    if isinstance(source, ModuleSource):
        return TensorSource(source._module, rank=rank)
    raise BridgeError(
        f"the source is {type(source).__name__}; allowed: TitanWeightSource(model or tensors), vLLM's ModuleSource"
    )


# Clients: the engine's control plane, as the trainer's rank 0 reaches it


class LLMClient:
    """An offline `LLM` in this process; for several engines that update together see `transfer.fanout`."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self._llm.shutdown_weight_transfer_engine()

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)

    def update_weight_version(self, version: str) -> None:
        self._llm.update_weight_version(version)

    def reset_prefix_cache(self) -> None:
        self._llm.reset_prefix_cache(reset_running_requests=True)
