"""`GET /v1/sharding_spec` and `/v1/fingerprints`: layout and weights of the running engine, as a vLLM endpoint plugin.

vLLM adds the routes only when `VLLM_PLUGINS` names the plugin; `titan-bridge serve --sharding-spec` does. Its entry
point has the same name as the general plugin, `titan_bridge`: `VLLM_PLUGINS` is one list for all kinds, and with a name
of its own, naming the routes alone would shut the general plugin out, so that vLLM would serve its own model without a
word.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request

from titan_bridge.engine.specs import FINGERPRINTS, HINT, LAYOUT, joined, missing, said, sealed
from titan_bridge.errors import BridgeError
from titan_bridge.sharding.layout import torch_dtype

PATH, FINGERPRINTS_PATH = "/v1/sharding_spec", "/v1/fingerprints"


class ShardingSpecEndpoint:
    """vLLM's `EndpointPlugin` protocol (`vllm/plugins/endpoint_plugins/interface.py`)."""

    name = "titan_bridge"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; `/v1` paths are behind vLLM's API key, if it has one."""
        app.add_api_route(PATH, sharding_spec, methods=["GET"], tags=["titan_bridge"])
        app.add_api_route(FINGERPRINTS_PATH, fingerprints, methods=["GET"], tags=["titan_bridge"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Nothing to keep: the routes ask the engine client that vLLM puts on the app's state."""


async def sharding_spec(request: Request) -> dict[str, Any]:
    """Where every parameter of the served model lives: `{"version", "meshes", "params"}`."""
    return await _ask(request, LAYOUT, joined)


async def fingerprints(request: Request, dtype: str | None = None) -> dict[str, Any]:
    """A fingerprint of each Hugging Face tensor of the live weights: `{"tensors": {name: hexadecimal}}`."""
    try:
        _ = None if dtype is None else torch_dtype(dtype)
    except BridgeError as error:
        raise HTTPException(400, str(error)) from None
    return {"tensors": await _ask(request, FINGERPRINTS, sealed, dtype)}


async def _ask(request: Request, method: str, put_together: Callable[[list[Any]], Any], *args: Any) -> Any:
    try:
        return put_together(await request.app.state.engine_client.collective_rpc(method, args=args))
    except BridgeError as error:
        raise HTTPException(500, str(error)) from None
    except Exception as error:
        if missing(error, method):
            raise HTTPException(404, f"this engine carries no specs; {HINT}") from None
        if (text := said(error)) is None:
            raise
        raise HTTPException(500, text) from error
