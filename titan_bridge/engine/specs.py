"""Ask a running engine where its parameters are, from outside: an offline `LLM`, or the engine client of a server.

Python: `titan_bridge.engine.specs.layout(llm)`; over HTTP: `GET /v1/sharding_spec` (`endpoint.py`); without an
engine: `titan-bridge inspect`. All three give the same layout.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from titan_bridge.errors import BridgeError
from titan_bridge.fingerprint import combine, seal
from titan_bridge.mesh import in_order
from titan_bridge.sharding.layout import Layout, torch_dtype

if TYPE_CHECKING:
    from vllm import LLM

LAYOUT, NATIVE, VERIFY = "titan_sharding_spec", "titan_native_specs", "titan_verify_specs"
FINGERPRINTS = "titan_fingerprints"
"""Names of the worker's methods, for `collective_rpc`."""

HINT = "serve with model_impl='torchtitan', or set additional_config.titan.attach_specs for vLLM's own models"


def layout(llm: LLM) -> Layout:
    """The layout of the model that `llm` serves, as its workers read it off their live parameters.

    Raises:
        BridgeError: The engine has no specs (`HINT` says what to set), or its workers do not agree.
    """
    return Layout.from_json(joined(_call(llm, LAYOUT)))


def native(llm: LLM) -> list[dict[str, Any]]:
    """For vLLM's own model, a worker each: the parts of fused parameters, padding, and what vLLM repacked.

    See `live.titan_native_specs`.
    """
    return _call(llm, NATIVE)


def verify(llm: LLM, checkpoint: str) -> list[list[dict[str, Any]]]:
    """A list for each worker: every live parameter against `checkpoint`, bit for bit; see `live.titan_verify_specs`."""
    return _call(llm, VERIFY, str(checkpoint))


def fingerprints(llm: LLM, dtype: str | None = None) -> dict[str, str]:
    """The fingerprint of each Hugging Face tensor of the live weights, in hexadecimal; see `titan_bridge.fingerprint`.

    Args:
        dtype: Cast the weights to it first, e.g. "bfloat16".

    Raises:
        BridgeError: vLLM's own model, or an engine that shares its experts with engines of other dp ranks.
    """
    return sealed(_call(llm, FINGERPRINTS, dtype))


def sealed(answers: Sequence[Any]) -> dict[str, str]:
    """Fingerprints from what the workers of an engine counted.

    Raises:
        BridgeError: Two workers of one rank (replicas of a dense model) have different weights, or a rank is missing.
    """
    by_rank: dict[int, Any] = {}
    for answer in answers:
        known = by_rank.setdefault(answer["rank"], answer)
        if known != answer:
            name = next(name for name, value in answer["sums"].items() if known["sums"].get(name) != value)
            raise BridgeError(
                f"two replicas of rank {answer['rank']} have different weights, first in {name}"
            )
    first = answers[0]
    if len(by_rank) < first["world"]:
        raise BridgeError(
            f"{len(by_rank)} of {first['world']} ranks answered: vLLM asks the engine of one dp rank, which has a part "
            "of the experts only; compare with dp=1, or with the trainer's verify()"
        )
    return {
        name: "{:016x}".format(
            seal(
                combine(int(each["sums"].get(name, "0"), 16) for each in by_rank.values()),
                shape,
                torch_dtype(first["dtypes"][name]),
            )
        )
        for name, shape in first["shapes"].items()
    }


def joined(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The layout of the model, as JSON, from what each worker said of its pipeline stage.

    Raises:
        BridgeError: Workers do not agree on what more than one of them has, with the first difference.
    """
    whole: dict[str, Any] = {**answers[0], "meshes": {}, "params": {}}
    for rank, answer in enumerate(answers):
        alike = {**answer}
        for part in ("meshes", "params"):
            alike[part] = {name: whole[part].get(name, said) for name, said in answer[part].items()}
        if alike != answer:
            before, now = alike["params"], answer["params"]
            names = [fqn for fqn in now if before[fqn] != now[fqn]]
            what = (
                f"{names[0]} is {_said(before[names[0]])} and {_said(now[names[0]])}" if names else "meshes"
            )
            raise BridgeError(f"workers 0 and {rank} hold different layouts: {what}")
        for part in ("meshes", "params"):
            whole[part].update(answer[part])
    whole["meshes"] = {name: whole["meshes"][name] for name in in_order(whole["meshes"])}
    return whole


def _said(param: dict[str, Any]) -> str:
    return f"{param['dtype']}{param['shape']} on {param['mesh']}({', '.join(param['placements'])})"


def _call(llm: LLM, method: str, *args: Any) -> list[Any]:
    try:
        return llm.collective_rpc(method, args=args)
    except Exception as error:
        if missing(error, method):
            raise BridgeError(f"this engine carries no specs; {HINT}") from None
        if (text := said(error)) is None:
            raise
        raise BridgeError(text) from error


def said(error: BaseException) -> str | None:
    """What a worker said in a `collective_rpc` that failed, whose kind of error is lost on the way; None: none did."""
    text = str(error)
    bare = text.removeprefix("Call to collective_rpc method failed: ")
    worker = re.fullmatch("Worker failed with error '(.*)', please check the stack trace .*", bare, re.DOTALL)
    return worker[1] if worker else bare if bare != text else None


def missing(error: BaseException, method: str) -> bool:
    """Whether a failed `collective_rpc` says that the workers have no such method."""
    return f"Method '{method}' is not implemented" in str(error)
