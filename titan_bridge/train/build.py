"""From a TOML file to TorchTitan's `Trainer.Config`: the model, the degrees, and where each value came from.

The process that starts a run and each of its ranks call `build` on the same values and get the same result. It
reads no weights and no text; it needs no process group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.tensor.placement_types import _StridedShard
from torchtitan.config import ParallelismConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.trainer import Trainer

from titan_bridge.config.reader import walk
from titan_bridge.config.train_schema import Data, TrainConfig
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes, check_divides, describe
from titan_bridge.model_layout import layout, specs
from titan_bridge.models import Family
from titan_bridge.run_folder import CHECKPOINT
from titan_bridge.sharding.boxes import fsdp_is_exact
from titan_bridge.sharding.layout import Layout
from titan_bridge.train import compat, data, overrides, source, tokenizer
from titan_bridge.train.output import DOCUMENTS

T = TypeVar("T")

_DEGREES = {
    "dp": "data_parallel_shard_degree",
    "tp": "tensor_parallel_degree",
    "ep": "expert_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a run is, before it runs.

    Attributes:
        config: what the TOML file and the command line say; `data` is filled in where text of ours is used.
        origin: dotted key -> "default", "titan-bridge", "cpu", a file, "--set", a flag, or the key that decides.
        out: the output folder.
        trainer: TorchTitan's config, ready to be built.
        family: of the model.
        hf_config: config.json of the model that is trained.
        expert_bias: whether routers have TorchTitan's load-balancing bias (a buffer in the checkpoint).
        sizes: degrees.
        nproc: processes.
    """

    config: TrainConfig
    origin: Mapping[str, str]
    out: Path
    trainer: Trainer.Config
    family: Family
    hf_config: dict[str, Any]
    expert_bias: bool
    sizes: Sizes
    nproc: int

    @property
    def data_ranks(self) -> int:
        """Ranks that read different text."""
        return self.sizes.dp_replicate * self.sizes.dp

    def layout(self) -> Layout:
        """Where the trainer's ranks hold every parameter."""
        assert self.trainer.model_spec is not None
        dtype = getattr(torch, self.trainer.training.dtype)
        return layout(self.trainer.model_spec.model, self.sizes, "shard", dtype=dtype, policy=None)

    def table(self) -> list[tuple[str, Any, str]]:
        """Rows (dotted key, value, origin) of every value, ours first, then TorchTitan's."""
        ours = dataclasses.asdict(self.config)
        ours.pop("trainer")
        ours |= {"out": str(self.out), "nproc": self.nproc}
        rows = [(key, value, self.origin.get(key, "default")) for key, value in walk(ours)]
        for key, value in overrides.leaves(self.trainer):
            rows.append((f"trainer.{key}", value, self.origin.get(f"trainer.{key}", "default")))
        return rows


def on_cpu() -> bool:
    """Whether this machine trains on its CPU."""
    return not torch.accelerator.is_available()


def build(config: TrainConfig, origin: Mapping[str, str], *, name: str = "train") -> Job:
    """Check everything that can be checked without text and weights, and make TorchTitan's config.

    Args:
        config: as the reader resolved it.
        origin: of each of its values, as the reader says it.
        name: stem of the output folder where `out` is not set.

    Raises:
        BridgeError: an unknown family, flavor or field, sizes that do not divide, a wrong number of processes.
    """
    origin = dict(origin)
    out = Path(config.out or f"out/train/{name}").expanduser().absolute()
    if config.uses_text and config.data is None:
        config = dataclasses.replace(config, data=Data())
    trainer, family, whence = source.trainer_config(config, origin)
    base_origin = {f"trainer.{key}": whence for key in source.differences(trainer)}
    trainer.dump_folder = str(out)
    trainer.checkpoint.folder = CHECKPOINT
    base_origin |= {"trainer.dump_folder": "out", "trainer.checkpoint.folder": "out"}
    if config.data is not None:
        trainer.hf_assets_path = str(out / CHECKPOINT)
        trainer.dataloader = HuggingFaceTextDataLoader.Config(
            dataset=data.NAME, dataset_path=str(out / DOCUMENTS)
        )
        for key in ("hf_assets_path", "dataloader.dataset", "dataloader.dataset_path"):
            base_origin[f"trainer.{key}"] = "data"
    if config.lr is not None:
        for index, group in enumerate(trainer.optimizer.param_groups):
            group.optimizer_kwargs["lr"] = config.lr
            base_origin[f"trainer.optimizer.param_groups.{index}.optimizer_kwargs.lr"] = "lr"
    base_origin |= _device_values(trainer, config, origin)
    overrides.apply(trainer, config.trainer, origin, prefix="trainer.")
    sizes, nproc = _degrees(trainer, config, origin, base_origin)
    spec = trainer.model_spec
    assert spec is not None
    _check_model(trainer, config, sizes, origin)
    hf_config = family.hf_config(spec.model, dtype=trainer.training.dtype)
    _located(origin, lambda: _check_even(hf_config, sizes))
    expert_bias = any(layer.moe and layer.moe.load_balance_coeff is not None for layer in spec.model.layers)
    if on_cpu():
        from titan_bridge.train import cpu  # noqa: PLC0415  absent where there is an accelerator

        trainer.model_spec = cpu.prepare_spec(
            spec, float32=trainer.training.mixed_precision_param == "float32"
        )
    return Job(
        config=config,
        origin={**base_origin, **origin},
        out=out,
        trainer=trainer,
        family=family,
        hf_config=hf_config,
        expert_bias=expert_bias,
        sizes=sizes,
        nproc=nproc,
    )


def _device_values(trainer: Trainer.Config, config: TrainConfig, origin: Mapping[str, str]) -> dict[str, str]:
    """Set what this torch and this device require and prefer; refuse what they cannot do. Returns the origins."""
    given = dict(walk(config.trainer))
    wanted = {path: (value, compat.ORIGIN) for path, value in compat.PREFERRED.items()}
    if on_cpu():
        from titan_bridge.train import cpu  # noqa: PLC0415  absent where there is an accelerator

        wanted |= {path: (value, "cpu") for path, value in (cpu.PREFERRED | cpu.REQUIRED).items()}
        for path, value in cpu.REQUIRED.items():
            if given.get(path, value) != value:
                place = origin.get(f"trainer.{path}", "the configuration")
                raise BridgeError(
                    f"{place}: trainer.{path} = {given[path]!r} does not run on a CPU; allowed here: {value!r}"
                )
    found: dict[str, str] = {}
    for path, (value, whence) in wanted.items():
        node: Any = trainer
        *tables, last = path.split(".")
        for table in tables:
            node = getattr(node, table)
        if path not in given and getattr(node, last) != value:
            setattr(node, last, value)
            found[f"trainer.{path}"] = whence
    return found


def _degrees(
    trainer: Trainer.Config, config: TrainConfig, origin: Mapping[str, str], found: dict[str, str]
) -> tuple[Sizes, int]:
    """Fill in the degrees and the number of processes; the origins go to `found`."""
    parallelism = trainer.parallelism
    for ours, theirs in _DEGREES.items():
        value = getattr(config.parallel, ours)
        if value is not None:
            setattr(parallelism, theirs, value)
            found[f"trainer.parallelism.{theirs}"] = f"parallel.{ours}"
    for name in ("pipeline_parallel_degree", "context_parallel_degree"):
        if (degree := getattr(parallelism, name)) > 1:
            key = f"trainer.parallelism.{name}"
            raise BridgeError(
                f"{origin.get(key, 'the configuration')}: {key} = {degree} is not supported by titan-bridge train; "
                "allowed: 1"
            )
    others = parallelism.data_parallel_replicate_degree * parallelism.tensor_parallel_degree
    nproc = config.nproc
    if parallelism.data_parallel_shard_degree == -1:
        left = 1 if nproc is None else max(1, nproc // others)
        parallelism.data_parallel_shard_degree = left
        found["trainer.parallelism.data_parallel_shard_degree"] = "nproc"
    product = others * parallelism.data_parallel_shard_degree
    if nproc is None:
        nproc = product
    if nproc != product:
        values = {name: getattr(parallelism, _DEGREES[name]) for name in ("dp_replicate", "dp", "tp")}
        factors = [f"{name}={value}" for name, value in values.items() if value > 1] or ["dp=1"]
        raise BridgeError(
            f"{origin.get('nproc', 'the configuration')}: nproc={nproc} is not the product of the degrees "
            f"{' * '.join(factors)} = {product}; set nproc={product}, leave it out, or change the degrees"
        )
    if not on_cpu() and nproc > torch.accelerator.device_count():
        raise BridgeError(
            f"{nproc} processes need a device each, and there are {torch.accelerator.device_count()}; lower the degrees"
        )
    return _located(origin, lambda: _sizes(parallelism)), nproc


def _sizes(parallelism: ParallelismConfig) -> Sizes:
    return Sizes(
        dp=parallelism.data_parallel_shard_degree,
        tp=parallelism.tensor_parallel_degree,
        ep=parallelism.expert_parallel_degree,
        dp_replicate=parallelism.data_parallel_replicate_degree,
    )


def _located(origin: Mapping[str, str], check: Callable[[], T]) -> T:
    """What `check` returns; a refusal of the degrees gets the places where they are set in front."""
    try:
        return check()
    except BridgeError as error:
        places = [
            place for key, place in origin.items() if key.startswith(("parallel.", "trainer.parallelism."))
        ]
        raise BridgeError(f"{', '.join(dict.fromkeys(places)) or 'the configuration'}: {error}") from None


def _check_even(hf_config: Mapping[str, Any], sizes: Sizes) -> None:
    """Refuse what torch cannot put together again: FSDP on top of tp or ep on a dim that they do not divide."""
    if sizes.dp == 1 or sizes.tp * sizes.ep == 1:
        return
    for name, parameter in specs(hf_config, sizes, "shard", policy=None).items():
        axes = describe(parameter.spec.mesh, sizes)
        for size, placement in zip(axes.shape, parameter.spec.placements, strict=True):
            if isinstance(placement, _StridedShard):
                length = parameter.shape[placement.dim]
                if not fsdp_is_exact(length, int(placement.split_factor), size):
                    raise BridgeError(
                        f"dim {placement.dim} of {name} has {length} elements, which {placement.split_factor} "
                        f"ranks of tp or ep and then {size} of dp do not divide; change dp={sizes.dp}, tp={sizes.tp} "
                        f"or ep={sizes.ep}"
                    )


def _check_model(
    trainer: Trainer.Config, config: TrainConfig, sizes: Sizes, origin: Mapping[str, str]
) -> None:
    """Sizes against degrees, sequence and batch; TorchTitan asserts the same later, in every rank."""
    spec, training = trainer.model_spec, trainer.training
    assert spec is not None
    _located(origin, lambda: check_divides(spec.model, sizes))
    if spec.model.vocab_size % sizes.tp:
        raise BridgeError(
            f"tp={sizes.tp} does not divide vocab_size={spec.model.vocab_size}; change one of them"
        )
    if training.seq_len > spec.model.max_seq_len:
        place = origin.get("trainer.training.seq_len", "the configuration")
        raise BridgeError(
            f"{place}: trainer.training.seq_len = {training.seq_len} is more than the model's "
            f"max_position_embeddings = {spec.model.max_seq_len}; lower the one or raise the other"
        )
    if trainer.parallelism.enable_sequence_parallel and training.seq_len % sizes.tp:
        raise BridgeError(
            f"tp={sizes.tp} does not divide trainer.training.seq_len={training.seq_len}, which sequence parallelism "
            "needs; change one, or set trainer.parallelism.enable_sequence_parallel=false"
        )
    step = training.local_batch_size * sizes.dp_replicate * sizes.dp
    if training.global_batch_size > 0 and training.global_batch_size % step:
        raise BridgeError(
            f"trainer.training.global_batch_size={training.global_batch_size} is not a multiple of local_batch_size "
            f"* dp_replicate * dp = {step}; give a multiple of {step}, or -1"
        )
    if config.data is not None:
        entries = tokenizer.planned_size(config.data)
        if entries > spec.model.vocab_size:
            raise BridgeError(
                f"the tokenizer has {entries} entries and the model's vocab_size is {spec.model.vocab_size}; "
                "give a smaller tokenizer (data.vocab_size) or a larger model"
            )
