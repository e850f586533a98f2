"""`GET /v1/sharding_spec` and `GET /v1/fingerprints`: where the running engine has its weights, and what they are.

A vLLM endpoint plugin. vLLM adds the routes only when `VLLM_PLUGINS` names it; `titan-bridge serve --sharding-spec`
does. Its entry point has the same name as the general plugin, `titan_bridge`: `VLLM_PLUGINS` is one list for all kinds,
and with a name of its own, naming the routes alone would shut the general plugin out, so that vLLM would serve its own
model without a word.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI, HTTPException, Request

from titan_bridge.engine.specs import FINGERPRINTS, HINT, LAYOUT, agreed, missing
from titan_bridge.errors import BridgeError

PATH = "/v1/sharding_spec"
FINGERPRINTS_PATH = "/v1/fingerprints"


class ShardingSpecEndpoint:
    """vLLM's `EndpointPlugin` protocol (`vllm/plugins/endpoint_plugins/interface.py`)."""

    name = "titan_bridge"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route; `/v1` paths are behind vLLM's API key, if it has one."""
        app.add_api_route(PATH, sharding_spec, methods=["GET"], tags=["titan_bridge"])
        app.add_api_route(FINGERPRINTS_PATH, fingerprints, methods=["GET"], tags=["titan_bridge"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Nothing to keep: the route asks the engine client that vLLM puts on the app's state."""


async def sharding_spec(request: Request) -> dict[str, Any]:
    """Where every parameter of the served model lives: `{"version", "meshes", "params"}`."""
    answers = await _ask(request, LAYOUT)
    try:
        return agreed(answers)
    except BridgeError as error:
        raise HTTPException(500, str(error)) from None


async def fingerprints(request: Request) -> dict[str, Any]:
    """A fingerprint of each served tensor, by Hugging Face name; generation waits while every weight is read once."""
    return (await _ask(request, FINGERPRINTS))[0]


async def _ask(request: Request, method: str) -> list[Any]:
    try:
        return await request.app.state.engine_client.collective_rpc(method)
    except Exception as error:
        if missing(error, method):
            raise HTTPException(404, f"this engine carries no specs; {HINT}") from None
        raise
