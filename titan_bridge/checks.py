"""What can be refused before an engine starts: the model, its directory, and the port."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_bridge.cpu import is_cpu_backend
from titan_bridge.errors import BridgeError
from titan_bridge.json_file import read_json_object

if TYPE_CHECKING:
    from titan_bridge.config.schema import InferConfig
    from titan_bridge.mesh import Sizes
    from titan_bridge.policy.schema import Policy


_TOKENIZERS = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")
"""Files of tokenizers that have no tokenizer.json."""


def check(config: InferConfig, *, text: bool = False) -> dict[str, Any]:
    """All checks on the model that need no engine; returns the parsed config.json.

    `text`: prompts will be text, so that a tokenizer must be there.
    For "torchtitan" these are the family, the sizes and our options, too, which imports torchtitan (3 s).

    Raises:
        BridgeError: the first thing that is wrong.
    """
    hf_config = overridden(model_directory(config.model), config.vllm.get("hf_overrides"))
    parallel = config.parallel
    experts = experts_in(hf_config)
    if parallel.ep > 1 and not experts:
        raise BridgeError(f"ep={parallel.ep}, but {config.model} has no experts; leave ep at 1")
    if config.model_impl == "torchtitan":
        from titan_bridge.engine.options import titan_options  # noqa: PLC0415  pydantic

        options = titan_options(config.additional_config())
        # vLLM runs dp of a dense model as engines that do not know of each other, unless they share its weights.
        together = experts or parallel.dense == "shard"
        sizes = parallel.sizes if together else replace(parallel.sizes, dp=1)
        model_fits(
            hf_config,
            sizes,
            max_model_len=config.max_model_len,
            policy=options.parallelism,
            attention_dp=options.attention_dp,
        )
        if is_cpu_backend():
            from titan_bridge.engine.cpu.head_dims import check_head_dim  # noqa: PLC0415  vLLM's platform, seconds

            check_head_dim(hf_config, latent=options.mla == "latent")
        weights_fit(config.model, options.step, hf_config, options.names)
    else:
        weights_present(config.model)
    vllm = config.engine_options()
    if not vllm.get("skip_tokenizer_init"):
        tokenizer_reads(Path(vllm.get("tokenizer") or config.model), needed=text)
    return hf_config


def tokenizer_reads(folder: Path, *, needed: bool) -> None:
    """Check that the tokenizer in a folder can be read, and, if it is `needed`, that there is one.

    Raises:
        BridgeError: the file that is missing or broken.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer  # noqa: PLC0415  not needed for what is refused before

        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # it raises nothing more special
            raise BridgeError(f"{file} is no tokenizer: {error}; copy or download it again") from None
    elif needed and folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise BridgeError(
            f"{folder} has no tokenizer (tokenizer.json, or one of {', '.join(_TOKENIZERS)}), which text needs; "
            "put it there, or name the folder of one: --set vllm.tokenizer=DIR"
        )


def model_fits(
    hf_config: Mapping[str, Any],
    sizes: Sizes,
    *,
    max_model_len: int | None = None,
    policy: Policy | None = None,
    attention_dp: bool | int = False,
) -> None:
    """Check that TorchTitan has this model, that the engine serves it and that it divides into `sizes` by `policy`.

    `policy`: none, if `sizes` have the widths of layers already.

    Raises:
        BridgeError: an architecture, field, value, size, rule or length, named with what is allowed.
    """
    from titan_bridge.mesh import check_divides  # noqa: PLC0415
    from titan_bridge.models import family_for  # noqa: PLC0415  torch and torchtitan
    from titan_bridge.policy.layers import split  # noqa: PLC0415  as above

    family = family_for(hf_config)
    config = family.model_config(hf_config)
    if sizes.pp > 1 and not sizes.stages:
        from titan_bridge.engine.model.stages import staged  # noqa: PLC0415  vLLM

        sizes = staged(sizes, len(config.layers))
    if policy is not None:
        sizes = split(policy, family, config, sizes, attention_dp=attention_dp).sizes
    check_divides(config, sizes, narrows=family.takes_policy)
    rope_covers(hf_config, max_model_len)


def overridden(hf_config: Mapping[str, Any], overrides: Any) -> dict[str, Any]:
    """config.json with vLLM's `hf_overrides` in it; a function among these is left to vLLM."""
    return {**hf_config, **overrides} if isinstance(overrides, Mapping) else dict(hf_config)


def rope_covers(hf_config: Mapping[str, Any], max_model_len: int | None) -> None:
    """Check that positions up to `max_model_len` are in the model's rope table.

    Raises:
        BridgeError: it is longer.
    """
    limit = hf_config.get("max_position_embeddings", 0)
    if limit and (max_model_len or 0) > limit:
        raise BridgeError(
            f"max_model_len={max_model_len} is over the model's rope limit "
            f"max_position_embeddings={limit}; allowed: up to {limit}"
        )


def weights_fit(model: str, step: int | None, hf_config: Mapping[str, Any], names: str | None = None) -> None:
    """Check that the headers of the weights are whole and hold what config.json describes; see `check_weights`.

    Raises:
        BridgeError: no weights that we read, a damaged file, or tensors that do not fit, all of them named.
    """
    from titan_bridge.checkpoint.model_dir import (  # noqa: PLC0415  torch
        check_weights,
        has_expert_bias,
        weights_directory,
    )
    from titan_bridge.models import family_for  # noqa: PLC0415  torchtitan

    directory = weights_directory(model, step)
    if directory is None:
        raise BridgeError(
            f"{model} has no weights; looked for safetensors, a DCP (.metadata) and the "
            "step-N folders of a training run"
        )
    family = family_for(hf_config)
    layers = range(hf_config["num_hidden_layers"] if has_expert_bias(model, step, names) else 0)
    biases = {f"layers.{i}.moe.expert_bias_E": None for i in layers}
    check_weights(directory, family, hf_config, biases, names)


def model_directory(model: str) -> dict[str, Any]:
    """Check that `model` is a directory with a readable config.json, and return what that says.

    Raises:
        BridgeError: no such directory, no config.json, or not a JSON object.
    """
    folder = Path(model)
    if not folder.exists():
        raise BridgeError(f"{model} does not exist; give the directory of a model, with its config.json")
    if not folder.is_dir():
        raise BridgeError(f"{model} is not a directory; give the directory of a model, or a .toml file")
    file = folder / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise BridgeError(f"{model} has no config.json (found: {found}); give a model in Hugging Face format")
    return read_json_object(file)


def weights_present(model: str) -> None:
    """Check that the safetensors files are all there and as long as their headers say.

    Reads headers only. A directory without safetensors is left to the loader.

    Raises:
        BridgeError: an index that names missing files, or a truncated or damaged file; all offenders named.
    """
    folder = Path(model)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = {str(n) for n in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BridgeError(f"{index} is no safetensors index: {type(error).__name__}: {error}") from None
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            raise BridgeError(f"{index} names files that are missing: {', '.join(missing)}")
    if damaged := [f"{file.name} ({reason})" for file in _safetensors(folder) if (reason := _damage(file))]:
        raise BridgeError(f"{model}: damaged safetensors: {'; '.join(damaged)}; copy or download them again")


def _safetensors(folder: Path) -> list[Path]:
    """The files of the index, or all there are."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(folder / name for name in named)


def _damage(file: Path) -> str | None:
    """Why `file` is not a whole safetensors file; None if it is."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            return f"its header alone wants {length + 8} bytes, it has {size}"
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return "its header is not JSON"
    if size != 8 + length + end:
        return f"its header promises {8 + length + end} bytes, it has {size}"
    return None


def port_free(host: str, port: int) -> None:
    """Check that a server can listen on `host:port`.

    Raises:
        BridgeError: the port is out of range or in use, or the host is not of this machine.
    """
    if not 0 < port < 65536:
        raise BridgeError(f"port {port} is out of range; allowed: 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        raise BridgeError(f"host {host!r} is not known; give an address of this machine") from None
    except OSError as error:
        raise BridgeError(
            f"port {port} on {host} cannot be used ({error.strerror}); "
            "stop what listens there or give another --port"
        ) from None


def experts_in(hf_config: Mapping[str, Any]) -> bool:
    """Whether the config is of a mixture-of-experts model, told as vLLM tells it."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(isinstance(hf_config.get(name), int) and hf_config[name] > 0 for name in names)
