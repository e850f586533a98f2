"""What every command on a served model shares: the flags, and the config that they and the TOML make."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from titan_bridge.errors import BridgeError
from titan_bridge.mesh import DEGREES

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
    """Directory of the model, a training run or one step of it, a name on the Hugging Face hub, or a .toml file."""
    dp: Annotated[Int, tyro.conf.arg(aliases=("--data-parallel-size", "-dp"))] = None
    """Data parallel groups."""
    tp: Annotated[Int, tyro.conf.arg(aliases=("--tensor-parallel-size", "-tp"))] = None
    """Tensor parallel ranks in a group."""
    pp: Annotated[Int, tyro.conf.arg(aliases=("--pipeline-parallel-size", "-pp"))] = None
    """Pipeline stages in a group."""
    ep: Int = None
    """Ranks that share the experts: 1 (no expert parallelism), dp * tp, or a divisor of it."""
    attention_tp: Annotated[Int, tyro.conf.arg(aliases=("--attn-tp",))] = None
    """Ranks of tp that attention is cut over; the others hold copies."""
    attention_dp: Annotated[str | None, tyro.conf.arg(metavar="[N]", help_behavior_hint="")] = None
    """Groups of tp ranks whose attention and KV cache have requests of their own; without a number as many as tp would
    hold copies of the cache."""
    policy: Annotated[Text, tyro.conf.arg(metavar="FILE")] = None
    """YAML or JSON with rules for each layer (parallelism_rules)."""
    enable_expert_parallel: Annotated[bool, tyro.conf.arg(aliases=("-ep",))] = False
    """The same as --ep with dp * tp."""
    model_impl: Text = None
    """torchtitan, or a value of vLLM's own option to compare with."""
    dense: Text = None
    """Dense weights over dp: replicate or shard."""
    dtype: Text = None
    """auto, float32, bfloat16 or float16."""
    names: Annotated[Text, tyro.conf.arg(metavar="PATTERN")] = None
    """Where another program wrote the weights: how it calls the tensor NAME, with {} in place of NAME."""
    max_model_len: Int = None
    """Longest sequence in tokens."""
    needs_weights: ClassVar[bool] = True
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
        from titan_bridge.run_folder import model_and_step

        if self.enable_expert_parallel and self.ep is not None:
            raise BridgeError(
                f"--enable-expert-parallel (-ep) and --ep {self.ep} both say ep; give one of them"
            )
        is_file = self.model.endswith(".toml")
        policy = None
        if self.policy is not None:
            from titan_bridge.policy.read import policy_of_flags  # yaml

            policy = policy_of_flags(self.policy, self.attention_tp).to_dict()
        resolved = resolve(
            InferConfig,
            file=self.model if is_file else None,
            sets=self.set,
            flags={
                "model": None if is_file else self.model,
                **{f"parallel.{name}": getattr(self, name) for name in DEGREES},
                "parallel.dense": self.dense,
                "parallel.attn_tp": self.attention_tp,
                "parallel.attention_dp": _groups(self.attention_dp),
                "parallelism": policy,
                "model_impl": self.model_impl,
                "dtype": self.dtype,
                "max_model_len": self.max_model_len,
                **(flags or {}),
            },
            others={"titan-bridge train": TrainConfig},
        )
        config = resolved.config
        parallel = config.parallel
        if self.enable_expert_parallel:
            parallel = dataclasses.replace(parallel, ep=parallel.sizes.most_ep)
            config = dataclasses.replace(config, parallel=parallel)
            origin = {**resolved.origin, "parallel.ep": "--enable-expert-parallel"}
            resolved = dataclasses.replace(resolved, config=config, origin=origin)
        additional = dict(config.vllm.get("additional_config") or {})
        titan = additional.get("titan") or {}
        found = local_folder(config.model, self.model if is_file else None, weights=self.needs_weights)
        model, step = model_and_step(found, titan.get("step"))
        stated = {key: value for key, value in (("step", step), ("names", self.names)) if value is not None}
        if model == config.model and not stated:
            return resolved
        vllm = {"served_model_name": config.model, **config.vllm}
        if stated:
            vllm["additional_config"] = {**additional, "titan": {**titan, **stated}}
        return dataclasses.replace(resolved, config=dataclasses.replace(config, model=model, vllm=vllm))


def _groups(given: str | None) -> bool | int | None:
    """The value of --attention-dp; the command line has "true" where no number followed."""
    if given in (None, "true", "false"):
        return None if given is None else given == "true"
    if not given.isdecimal() or not int(given):
        raise BridgeError(f"--attention-dp {given} is no number of groups; give at least 1, or no number")
    return int(given)


def local_folder(model: str, file: str | None, *, weights: bool) -> str:
    """The folder that `model` names: itself, or a model of the Hugging Face hub in huggingface_hub's cache.

    Args:
        file: The TOML file that names it; None for the command line.
        weights: Whether safetensors are needed, or only JSON.

    Raises:
        BridgeError: No such folder, and no such model on the hub, or in the cache when it is offline.
    """
    if os.path.exists(model):
        return model
    if "://" in model:
        from titan_bridge.checkpoint.open import refuse_remote  # torch, only to say no

        refuse_remote(model)
    hint = "give the directory of a model, with its config.json"
    if file is not None:
        hint = f"{file} names it, relative to the working directory {os.getcwd()}"
        if model.startswith("out/demo/"):
            hint += "; in the repository's root `bash scripts/demo.sh` makes it, or see the top of the file"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model):
        raise BridgeError(f"{model} does not exist; {hint}")
    from huggingface_hub import constants, snapshot_download  # a second that a folder does without
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "tokenizer.model", *(["*.safetensors"] if weights else [])]
    try:
        return snapshot_download(model, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = "is not in the cache of Hugging Face models, and HF_HUB_OFFLINE is set"
        if not constants.HF_HUB_OFFLINE:
            reason = f"did not come from the Hugging Face hub ({str(error).splitlines()[0]})"
        raise BridgeError(f"{model} does not exist; {hint}; as a name on the hub it {reason}") from None


SHORT = {
    "-O": "--optimization-level",
    "-cc": "--compilation-config",
    "-sc": "--speculative-config",
    "-q": "--quantization",
    "-n": "--nnodes",
    "-r": "--node-rank",
    "-dpl": "--data-parallel-size-local",
}
"""vLLM's short names of options that are read here."""


def parse_vllm_options(arguments: Sequence[str]) -> dict[str, Any]:
    """vLLM options from the command line as keyword arguments: `--max-num-seqs 4` -> `{"max_num_seqs": 4}`.

    A value is read as TOML or JSON, else as text; an option without a value is True, `--no-x` is False; several values
    are a list. `--x.y.z 1` is `{"x": {"y": {"z": 1}}}`.

    Raises:
        BridgeError: an argument that is no option, or an option that a flag of ours says.
    """
    from titan_bridge.config.reader import toml_value  # tomli, not needed for --help
    from titan_bridge.config.schema import OWNED_BY_US

    options: dict[str, Any] = {}
    for argument, *values in split_options(arguments):
        name, *path = option_name(argument)
        if not name:
            raise BridgeError(
                f"{argument!r} is not an option; vLLM options begin with -, see `vllm serve --help=all`"
            )
        if name in OWNED_BY_US:
            raise BridgeError(f"{argument} is set by {OWNED_BY_US[name]}; write it there, or before a --")
        if "=" in argument:
            values.insert(0, argument.partition("=")[2])
        elif argument[:2] == "-O" and argument[2:]:
            values.insert(0, argument[2:])
        given = [toml_value(value) for value in values]
        value = given if len(given) > 1 else given[0] if given else True
        if not given and name.startswith("no_"):
            name, value = name.removeprefix("no_"), False
        place = options
        for key in (name, *path)[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                option = name.replace("_", "-")
                raise BridgeError(
                    f"{argument}: --{option} has the value {place!r} already; give one of the two"
                )
        place[(name, *path)[-1]] = value
    return options


def split_options(arguments: Sequence[str]) -> list[list[str]]:
    """Each option with its values, as written: `["--a=1", "--b", "2", "3"]` -> `[["--a=1"], ["--b", "2", "3"]]`."""
    found: list[list[str]] = []
    for argument in arguments:
        if option_name(argument)[0] or not found:
            found.append([argument])
        else:
            found[-1].append(argument)
    return found


def option_name(argument: str) -> list[str]:
    """`"--compilation-config.mode=0"` -> `["compilation_config", "mode"]`; `[""]` for what is not an option."""
    first, *path = argument.partition("=")[0].split(".")
    first = "--optimization-level" if re.fullmatch(r"-O.*", first) else SHORT.get(first, first)
    return [first[2:].replace("-", "_"), *path] if first.startswith("--") else [""]


_JSON_LISTS = ("allowed_origins", "allowed_methods", "allowed_headers")
"""Options of vLLM's whose list is one word of JSON; of all others each item is a word."""


def format_vllm_options(options: Mapping[str, Any]) -> list[str]:
    """The reverse, for `vllm serve`: `{"max_num_seqs": 4, "eager": True}` -> `["--max-num-seqs", "4", "--eager"]`."""
    import json  # with the rest of run()

    arguments: list[str] = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list) and key not in _JSON_LISTS:
            arguments += [f"--{flag}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in value)]
        elif isinstance(value, (dict, list)):
            arguments += [f"--{flag}", json.dumps(value)]
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments
