"""Ask a running engine where its parameters are, from outside: an offline `LLM`, or the engine client of a server.

Python: `titan_bridge.engine.specs.layout(llm)`; over HTTP: `GET /v1/sharding_spec` (`endpoint.py`); without an
engine: `titan-bridge inspect`. All three give the same layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from titan_bridge.errors import BridgeError
from titan_bridge.fingerprint import combine, seal
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
    return Layout.from_json(agreed(_call(llm, LAYOUT)))


def native(llm: LLM) -> list[dict[str, Any]]:
    """For vLLM's own model, a worker each: the parts of fused parameters, padding, and what vLLM repacked.

    See `live.titan_native_specs`.
    """
    return _call(llm, NATIVE)


def verify(llm: LLM, checkpoint: str) -> list[list[dict[str, Any]]]:
    """A list for each worker: every live parameter against `checkpoint`, bit for bit; see `live.titan_verify_specs`.

    With data parallelism the engines of all dp ranks must be asked at the same time.
    """
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


def agreed(answers: Sequence[Any]) -> Any:
    """The one answer that all workers gave. Raises BridgeError with the first difference when they do not agree."""
    for rank, answer in enumerate(answers):
        if answer != answers[0]:
            one, other = (Layout.from_json(said) for said in (answers[0], answer))
            names = [
                fqn for fqn in {**one.params, **other.params} if one.params.get(fqn) != other.params.get(fqn)
            ]
            what = (
                f"{names[0]} is {one.params.get(names[0])} and {other.params.get(names[0])}"
                if names
                else "meshes"
            )
            raise BridgeError(f"workers 0 and {rank} hold different layouts: {what}")
    return answers[0]


def _call(llm: LLM, method: str, *args: Any) -> list[Any]:
    try:
        return llm.collective_rpc(method, args=args)
    except Exception as error:
        if missing(error, method):
            raise BridgeError(f"this engine carries no specs; {HINT}") from None
        raise


def missing(error: BaseException, method: str) -> bool:
    """Whether a failed `collective_rpc` says that the workers have no such method."""
    return f"Method '{method}' is not implemented" in str(error)
