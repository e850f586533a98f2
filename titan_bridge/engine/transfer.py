"""Weight transfer backend "titan" for vLLM's framework: `weight_transfer_config={"backend": "titan"}`.

Both halves are thin: what happens is in `titan_bridge.transfer`, whose `Trainer` does the same as the trainer's half
here without vLLM. When the worker's half raises is said in `transfer.worker`.

    engine = WeightTransferTrainerFactory.trainer_init(
        TitanTrainerInitInfo(rank=rank, world=2),
        client=HTTPVLLMWeightSyncClient("http://engine:8000"),
        source=TitanWeightSource(model, rank=rank),
    )
    engine.send_weights()  # on every trainer rank, after every step
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
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

from titan_bridge.engine.log import logger_of
from titan_bridge.engine.transfer_target import adapter_target, target_of
from titan_bridge.errors import BridgeError
from titan_bridge.transfer.clients import LLMClient
from titan_bridge.transfer.options import Options, Report, Transport
from titan_bridge.transfer.protocol import BUCKET_BYTES, PauseMode, Terms, Update, parsed
from titan_bridge.transfer.source import Tensors, TensorSource
from titan_bridge.transfer.trainer import Trainer
from titan_bridge.transfer.worker import Worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "LLMClient", "TitanTrainerInitInfo", "TitanTrainerWeightTransferEngine", "TitanWeightSource",
    "TitanWeightTransferEngine",
]  # fmt: skip

logger = logger_of(__name__)


# The worker's half


@dataclass
class TitanInitInfo(WeightTransferInitInfo):
    terms: Terms


@dataclass
class TitanUpdateInfo(WeightTransferUpdateInfo):
    update: Update


class TitanWeightTransferEngine(WeightTransferEngine[TitanInitInfo, TitanUpdateInfo]):
    """Receives exactly the slices that this worker holds; see `transfer.protocol` for what is promised."""

    init_info_cls = TitanInitInfo
    update_info_cls = TitanUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        draft = vllm_config.speculative_config
        if draft is not None and draft.method == "draft_model":
            logger.warning("Weight updates leave the draft model %s as it is", draft.model)
        self.worker = Worker(
            target_of(model, vllm_config), functools.partial(adapter_target, model, vllm_config)
        )

    def parse_init_info(self, init_dict: dict[str, Any]) -> TitanInitInfo:
        return TitanInitInfo(terms=parsed(Terms, "init_info", init_dict))

    def parse_update_info(self, update_dict: dict[str, Any]) -> TitanUpdateInfo:
        return TitanUpdateInfo(update=parsed(Update, "update_info", update_dict))

    def init_transfer_engine(self, init_info: TitanInitInfo) -> None:
        self.worker.connect(init_info.terms)

    def start_weight_update(self) -> None:
        self.worker.begin()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Without the base's synchronisation of the device: nothing live is written here.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: TitanUpdateInfo) -> None:
        self.worker.decide(update_info.update)

    @torch.no_grad()
    def finish_weight_update(self) -> None:
        self.worker.finish()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        self.worker.shutdown()


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
    """How a trainer rank takes part; the fields of `transfer.options.Options`, under vLLM's names where it has some."""

    backend: ClassVar[str] = "titan"

    world: int = 1
    """Trainer ranks; several need torch.distributed."""
    address: str | None = None
    """Of this rank, as the other ranks and all workers reach it; None: found as in `Options.host`."""
    port: int = 0
    """Rank r listens at port + r; 0 takes free ones."""
    timeout_seconds: float = 300.0
    """Of a connection, and of each step of an update."""
    bucket_bytes: int = BUCKET_BYTES
    """Most bytes of one message; a rank packs two at a time."""
    delta: bool = True
    """Keep a copy of what the engine has, and send only what differs where that is less."""
    pause: PauseMode = "keep"
    """What requests in flight do while an update becomes live; see `Options.pause`."""
    transport: Transport = "auto"
    """What tensors travel over; see `Options.transport`."""
    adapter: str | None = None
    """Name of the engine's LoRA adapter that is sent instead of the weights; see `Trainer`."""


class TitanTrainerWeightTransferEngine(TrainerWeightTransferEngine[TitanTrainerInitInfo]):
    """One trainer rank: `trainer_init`, then `send_weights` on all ranks together."""

    init_info_cls = TitanTrainerInitInfo

    def __init__(self, *, client: Any, source: WeightSource | None, info: TitanTrainerInitInfo) -> None:
        super().__init__(client=client, source=source, is_sender=info.is_sender)
        self.trainer = Trainer(
            _tensors_of(source, info.rank),
            client,
            rank=info.rank,
            world=info.world,
            options=Options(
                host=info.address,
                port=info.port,
                seconds=info.timeout_seconds,
                bucket_bytes=info.bucket_bytes,
                delta=info.delta,
                pause=info.pause,
                transport=info.transport,
            ),
            adapter=info.adapter,
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
        """Bring the weights into the engine; returns when they are served. See `Trainer.send`."""
        self.report = self.trainer.send(version)

    def shutdown(self) -> None:
        """Leave the engine to another trainer."""
        self.trainer.close()


def _tensors_of(source: WeightSource | None, rank: int) -> TensorSource:
    if isinstance(source, TitanWeightSource):
        return source.tensors
    if isinstance(source, ModuleSource):
        return TensorSource(source._module, rank=rank)
    raise BridgeError(
        f"the source is {type(source).__name__}; allowed: TitanWeightSource(model or tensors), vLLM's ModuleSource"
    )
