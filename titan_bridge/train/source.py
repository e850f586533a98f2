"""Where TorchTitan's `Trainer.Config` comes from before anything is overridden: a family with one of TorchTitan's
flavors, a family with explicit sizes, or a Python function."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import default_adamw
from torchtitan.config.configs import DebugConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from titan_bridge.config.train_schema import ModelSizes, TrainConfig
from titan_bridge.errors import BridgeError, did_you_mean
from titan_bridge.models import Family, families, family_of
from titan_bridge.train import overrides, tokenizer

OURS = "titan-bridge"
"""Origin of a value that is a default of ours where TorchTitan's is another."""

_VOCAB_MULTIPLE = 64


def trainer_config(config: TrainConfig, origin: Mapping[str, str]) -> tuple[Trainer.Config, Family, str]:
    """TorchTitan's config before any override, the family, and the origin of what it sets."""
    model = config.model
    if model.config is not None:
        trainer = _call(model.config, origin.get("model.config", "the configuration"))
        spec = trainer.model_spec
        if spec is None or not isinstance(spec.model, Decoder.Config):
            raise BridgeError(
                f"model.config = {model.config!r} returns a Trainer.Config without a decoder model"
            )
        return trainer, family_of(spec.model), model.config
    family = _family(str(model.family), origin)
    flavors = family.flavors()
    if not flavors:
        place = origin.get("model.family", "the configuration")
        raise BridgeError(
            f"{place}: model.family = {family.name!r} cannot be trained: its Family has no flavors() and model_spec()"
        )
    if model.sizes is None:
        if model.flavor not in flavors:
            place = origin.get("model.flavor", "the configuration")
            raise BridgeError(_unknown(place, "model.flavor", str(model.flavor), flavors))
        spec = family.model_spec(str(model.flavor))
    else:
        assert config.data is not None
        rows = model.sizes.vocab_size or _rounded(tokenizer.planned_size(config.data))
        spec = dataclasses.replace(
            family.model_spec(next(iter(flavors))),
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


def differences(trainer: Trainer.Config) -> list[str]:
    """Paths at which a config differs from TorchTitan's defaults."""
    plain = dict(overrides.leaves(Trainer.Config()))
    missing = object()
    return [path for path, value in overrides.leaves(trainer) if plain.get(path, missing) != value]


def _call(target: str, place: str) -> Trainer.Config:
    module_name, function_name = target.split(":")
    if (
        os.getcwd() not in sys.path
    ):  # a function beside the TOML file: the console script's path has no such entry
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's
        raise BridgeError(
            f"{place}: model.config = {target!r}: {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [value for value in vars(module).values() if inspect.isfunction(value)]
        names = [value.__name__ for value in own if value.__module__ == module_name]
        raise BridgeError(_unknown(place, f"model.config: function in {module_name}", function_name, names))
    try:
        result = function()
    except Exception as error:  # the function is the user's
        raise BridgeError(
            f"{place}: model.config = {target!r} fails: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, Trainer.Config):
        raise BridgeError(
            f"{place}: model.config = {target!r} returns {type(result).__qualname__}; it must be a Trainer.Config"
        )
    # The function may return one object each time; ours is changed below.
    return copy.deepcopy(result)


def _family(name: str, origin: Mapping[str, str]) -> Family:
    known = {family.name: family for family in families()}
    if name not in known:
        raise BridgeError(
            _unknown(origin.get("model.family", "the configuration"), "model.family", name, known)
        )
    return known[name]


def _unknown(place: str, what: str, given: str, known: Any) -> str:
    return f"{place}: {what} = {given!r} is unknown; {did_you_mean(given, known)}allowed: {', '.join(known)}"


def _model_config(family: Family, sizes: ModelSizes, vocab: int) -> Decoder.Config:
    stated: dict[str, Any] = {
        key: value for key, value in dataclasses.asdict(sizes).items() if value is not None
    }
    stated |= {**stated.pop("other"), "vocab_size": vocab}
    stated["architectures"] = [family.architecture(experts=sizes.num_experts is not None)]
    try:
        config = family.model_config(stated)
    except BridgeError as error:
        text = (
            str(error)
            .replace(" in config.json is", " in [model.sizes] is")
            .replace("config.json", "[model.sizes]")
        )
        raise BridgeError(text) from None
    if sizes.num_experts is not None and not any(layer.moe for layer in config.layers):
        raise BridgeError(
            f"model.sizes.num_experts: family {family.name} has no mixture of experts; leave it out"
        )
    return config


def _rounded(entries: int) -> int:
    return -(-entries // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
