"""Ask a running engine where its parameters are, from outside: an offline `LLM`, or the engine client of a server.

`python`: `titan_bridge.engine.specs.layout(llm)`; over HTTP: `GET /v1/sharding_spec` (`endpoint.py`); without an
engine: `titan-bridge inspect`. All three give the same layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.layout import Layout

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


def agreed(answers: Sequence[Any]) -> Any:
    """The one answer that all workers gave. Raises BridgeError with the first difference when they do not agree."""
    for rank, answer in enumerate(answers):
        if answer != answers[0]:
            difference = Layout.from_json(answers[0]).diff(Layout.from_json(answer))
            raise BridgeError(f"workers 0 and {rank} hold different layouts: {difference[0]}")
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
