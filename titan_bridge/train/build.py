"""From a TOML file to TorchTitan's `Trainer.Config`: the model, the degrees, and where each value came from.

The process that starts a run and each of its ranks call `build` on the same values and get the same result. It
reads no weights and no text; it needs no process group.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import default_adamw
from torchtitan.config.configs import DebugConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from titan_bridge.config.train_schema import Data, ModelSizes, TrainConfig
from titan_bridge.errors import BridgeError
from titan_bridge.mesh import Sizes, check_divides
from titan_bridge.models import Family, families, family_of
from titan_bridge.train import compat, data, overrides, tokenizer
from titan_bridge.train.output import CHECKPOINT, DOCUMENTS

OURS = "titan-bridge"
"""Origin of a value that is a default of ours where TorchTitan's is another."""

_VOCAB_MULTIPLE = 64

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
        sizes: degrees; context parallelism is in none of them.
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

    def table(self) -> list[tuple[str, Any, str]]:
        """Rows (dotted key, value, origin) of every value, ours first, then TorchTitan's."""
        ours = dataclasses.asdict(self.config)
        ours.pop("trainer")
        ours |= {"out": str(self.out), "nproc": self.nproc}
        rows = [(key, value, self.origin.get(key, "default")) for key, value in overrides.flatten(ours)]
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
    trainer, family, whence = _trainer_config(config, origin)
    base_origin = {f"trainer.{key}": whence for key in _differences(trainer)}
    trainer.dump_folder = str(out)
    trainer.checkpoint.folder = CHECKPOINT
    base_origin |= {"trainer.dump_folder": "out", "trainer.checkpoint.folder": "out"}
    if config.data is not None:
        trainer.hf_assets_path = str(out / CHECKPOINT)
        trainer.dataloader = HuggingFaceTextDataLoader.Config(dataset=data.NAME, dataset_path=str(out / DOCUMENTS))
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


def _trainer_config(config: TrainConfig, origin: Mapping[str, str]) -> tuple[Trainer.Config, Family, str]:
    """TorchTitan's config before any override, the family, and the origin of what it sets."""
    model = config.model
    if model.config is not None:
        trainer = _call(model.config, origin.get("model.config", "the configuration"))
        spec = trainer.model_spec
        if spec is None or not isinstance(spec.model, Decoder.Config):
            raise BridgeError(f"model.config = {model.config!r} returns a Trainer.Config without a decoder model")
        return trainer, family_of(spec.model), model.config
    family = _family(str(model.family), origin)
    registry = importlib.import_module(family.model_class.__module__.rsplit(".", 1)[0])
    if model.sizes is None:
        flavors = getattr(registry, f"{family.name}_configs")
        if model.flavor not in flavors:
            place = origin.get("model.flavor", "the configuration")
            raise BridgeError(_unknown(place, "model.flavor", str(model.flavor), flavors))
        spec = registry.model_registry(model.flavor)
    else:
        assert config.data is not None
        rows = model.sizes.vocab_size or _rounded(tokenizer.planned_size(config.data))
        spec = dataclasses.replace(
            registry.model_registry(next(iter(getattr(registry, f"{family.name}_configs")))),
            flavor="sizes",
            model=_model_config(family, model.sizes, rows),
        )
    return _defaults(spec), family, OURS


def _defaults(spec: ModelSpec) -> Trainer.Config:
    """Where these differ from TorchTitan's, it is so that a run can be repeated, watched and gone on with."""
    return Trainer.Config(
        model_spec=spec,
        loss=ChunkedLossWrapper.Config(
            loss_fn=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size)
        ),
        optimizer=default_adamw(lr=1e-3),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=100, keep_latest_k=2, last_save_model_only=False
        ),
        metrics=MetricsProcessor.Config(enable_tensorboard=True, disable_color_printing=True),
        debug=DebugConfig(seed=42, enable_structured_logging=False),
        dataloader=HuggingFaceTextDataLoader.Config(),
    )


def _differences(trainer: Trainer.Config) -> list[str]:
    """Paths at which a config differs from TorchTitan's defaults."""
    plain = dict(overrides.leaves(Trainer.Config()))
    missing = object()
    return [path for path, value in overrides.leaves(trainer) if plain.get(path, missing) != value]


def _call(target: str, place: str) -> Trainer.Config:
    module_name, function_name = target.split(":")
    if os.getcwd() not in sys.path:  # a function beside the TOML file: the console script's path has no such entry
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise BridgeError(f"{place}: model.config = {target!r}: {module_name} cannot be imported: {error}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and n[0].islower()]
        raise BridgeError(_unknown(f"{place}: model.config", f"function in {module_name}", function_name, names))
    result = function()
    if not isinstance(result, Trainer.Config):
        raise BridgeError(
            f"{place}: model.config = {target!r} returns {type(result).__qualname__}; it must be a Trainer.Config"
        )
    # The function may return one object each time; ours is changed below.
    return copy.deepcopy(result)


def _family(name: str, origin: Mapping[str, str]) -> Family:
    known = {family.name: family for family in families()}
    if name not in known:
        raise BridgeError(_unknown(origin.get("model.family", "the configuration"), "model.family", name, known))
    return known[name]


def _unknown(place: str, what: str, given: str, known: Any) -> str:
    near = difflib.get_close_matches(given, list(known), n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"{place}: {what} = {given!r} is unknown; {guess}allowed: {', '.join(known)}"


def _model_config(family: Family, sizes: ModelSizes, vocab: int) -> Decoder.Config:
    stated = {key: value for key, value in dataclasses.asdict(sizes).items() if value is not None}
    stated |= {"vocab_size": vocab}
    sparse = [name for name in family.architectures if "Moe" in name]
    dense = [name for name in family.architectures if "Moe" not in name]
    if sizes.num_experts is not None and not sparse:
        raise BridgeError(f"model.sizes.num_experts: family {family.name} has no mixture of experts; leave it out")
    stated["architectures"] = (sparse if sizes.num_experts is not None else dense)[:1]
    try:
        return family.model_config(stated)
    except BridgeError as error:
        text = str(error).replace(" in config.json is", " in [model.sizes] is").replace("config.json", "[model.sizes]")
        raise BridgeError(text) from None


def _rounded(entries: int) -> int:
    return -(-entries // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def _device_values(
    trainer: Trainer.Config, config: TrainConfig, origin: Mapping[str, str]
) -> dict[str, str]:
    """Set what this torch and this device require and prefer; refuse what they cannot do. Returns the origins."""
    given = dict(overrides.flatten(config.trainer))
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
    others = (
        parallelism.data_parallel_replicate_degree
        * parallelism.tensor_parallel_degree
        * parallelism.pipeline_parallel_degree
        * parallelism.context_parallel_degree
    )
    nproc = config.nproc
    if parallelism.data_parallel_shard_degree == -1:
        left = 1 if nproc is None else max(1, nproc // others)
        parallelism.data_parallel_shard_degree = left
        found["trainer.parallelism.data_parallel_shard_degree"] = "nproc"
    product = others * parallelism.data_parallel_shard_degree
    if nproc is None:
        nproc = product
    if nproc != product:
        names = ("dp_replicate", "dp", "tp", "pp", "cp")
        values = (
            parallelism.data_parallel_replicate_degree,
            parallelism.data_parallel_shard_degree,
            parallelism.tensor_parallel_degree,
            parallelism.pipeline_parallel_degree,
            parallelism.context_parallel_degree,
        )
        factors = [f"{n}={v}" for n, v in zip(names, values, strict=True) if v > 1] or ["dp=1"]
        raise BridgeError(
            f"{origin.get('nproc', 'the configuration')}: nproc={nproc} is not the product of the degrees "
            f"{' * '.join(factors)} = {product}; set nproc={product}, leave it out, or change the degrees"
        )
    if not on_cpu() and nproc > torch.accelerator.device_count():
        raise BridgeError(
            f"{nproc} processes need a device each, and there are {torch.accelerator.device_count()}; lower the degrees"
        )
    sizes = Sizes(
        dp=parallelism.data_parallel_shard_degree,
        tp=parallelism.tensor_parallel_degree,
        ep=parallelism.expert_parallel_degree,
        dp_replicate=parallelism.data_parallel_replicate_degree,
        pp=parallelism.pipeline_parallel_degree,
    )
    return sizes, nproc


def _check_model(
    trainer: Trainer.Config, config: TrainConfig, sizes: Sizes, origin: Mapping[str, str]
) -> None:
    """Sizes against degrees, sequence and batch; TorchTitan asserts the same later, in every rank."""
    spec, training = trainer.model_spec, trainer.training
    assert spec is not None
    check_divides(spec.model, sizes)
    if spec.model.vocab_size % sizes.tp:
        raise BridgeError(f"tp={sizes.tp} does not divide vocab_size={spec.model.vocab_size}; change one of them")
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
