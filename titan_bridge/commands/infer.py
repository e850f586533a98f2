"""What every command on a served model shares: the flags, and the config that they and the TOML make."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from titan_bridge.errors import BridgeError

if TYPE_CHECKING:
    from titan_bridge.config.reader import Resolved
    from titan_bridge.config.schema import InferConfig


Int = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="")]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
"""Options that may be left out, without "None" in the help."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferCommand:
    """Flags of a command that takes a model directory or a TOML file. A flag overrides the file."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory of the model, or a .toml file (see configs/infer/)."""
    dp: Int = None
    """Data parallel groups."""
    tp: Int = None
    """Tensor parallel ranks in a group."""
    ep: Int = None
    """Ranks that share the experts: 1 (no expert parallelism), dp * tp, or a divisor of it."""
    dense: Text = None
    """Dense weights over dp: replicate or shard."""
    dtype: Text = None
    """auto, float32, bfloat16 or float16."""
    max_model_len: Int = None
    """Longest sequence in tokens."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Set one key of the TOML, for instance --set vllm.max_num_seqs=8; may be repeated."""

    def resolve(self, flags: Mapping[str, Any] | None = None) -> Resolved[InferConfig]:
        """Merge defaults, the TOML file, `--set` and the flags; `flags` are the command's own, by dotted key.

        Raises:
            BridgeError: what the file or a flag says is not allowed.
        """
        from titan_bridge.config.reader import resolve  # pydantic and tomli, not needed for --help
        from titan_bridge.config.schema import InferConfig
        from titan_bridge.config.train_schema import TrainConfig
        from titan_bridge.train.output import model_and_step

        is_file = self.model.endswith(".toml")
        resolved = resolve(
            InferConfig,
            file=self.model if is_file else None,
            sets=self.set,
            flags={
                "model": None if is_file else self.model,
                "parallel.dp": self.dp,
                "parallel.tp": self.tp,
                "parallel.ep": self.ep,
                "parallel.dense": self.dense,
                "dtype": self.dtype,
                "max_model_len": self.max_model_len,
                **(flags or {}),
            },
            others={"titan-bridge train": TrainConfig},
        )
        config = resolved.config
        model, step = model_and_step(config.model)
        if model == config.model:
            return resolved
        additional = dict(config.vllm.get("additional_config") or {})
        if step is not None:
            additional["titan"] = {**(additional.get("titan") or {}), "step": step}
        vllm = {**config.vllm, "additional_config": additional} if additional else config.vllm
        return dataclasses.replace(resolved, config=dataclasses.replace(config, model=model, vllm=vllm))


def parse_vllm_options(arguments: Sequence[str]) -> dict[str, Any]:
    """vLLM options from the command line as keyword arguments: `--max-num-seqs 4` -> `{"max_num_seqs": 4}`.

    A value is read as TOML or JSON, else as text; an option without a value is True, `--no-x` is False.

    Raises:
        BridgeError: an argument that is no option.
    """
    from titan_bridge.config.reader import toml_value  # tomli, not needed for --help

    options: dict[str, Any] = {}
    rest = [argument for argument in arguments if argument != "--"]
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise BridgeError(
                f"{name!r} is not an option; vLLM options begin with --, see `vllm serve --help=all`"
            )
        key = name.removeprefix("--").replace("-", "_")
        if equals:
            options[key] = toml_value(value)
        elif rest and not rest[0].startswith("--"):
            options[key] = toml_value(rest.pop(0))
        elif key.startswith("no_"):
            options[key.removeprefix("no_")] = False
        else:
            options[key] = True
    return options


def format_vllm_options(options: Mapping[str, Any]) -> list[str]:
    """The reverse, for `vllm serve`: `{"max_num_seqs": 4, "eager": True}` -> `["--max-num-seqs", "4", "--eager"]`."""
    import json  # with the rest of run()

    arguments: list[str] = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (dict, list)):
            arguments += [f"--{flag}", json.dumps(value)]
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments
