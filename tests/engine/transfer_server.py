"""A server that is updated while it answers, for the tests of live weight transfer."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx

from titan_bridge.transfer.clients import HTTPClient


class Server:
    """A running server that was started from checkpoint b."""

    def __init__(self, url: str) -> None:
        self.url, self.client = url, HTTPClient(url)
        self.fresh = self.answers()

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}{path}", timeout=60).raise_for_status().json()

    def ask(self, **given: Any) -> dict[str, Any]:
        body = {"model": "moe", "temperature": 0, "ignore_eos": True, **given}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120).raise_for_status().json()

    def answers(self) -> list[float]:
        """What `Engine.answers` gives."""
        said = self.ask(prompt=list(range(7, 47)), max_tokens=6, prompt_logprobs=0, logprobs=0)
        (choice,) = said["choices"]
        prompt = [next(iter(row.values()))["logprob"] for row in choice["prompt_logprobs"][1:]]
        return prompt + choice["logprobs"]["token_logprobs"]

    def cached(self) -> int:
        """Tokens of a prompt of two blocks and more that came out of the prefix cache."""
        said = self.ask(prompt=list(range(100, 400)), max_tokens=1)
        return (said["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0


class Request(threading.Thread):
    """A request that streams; `begun` once it has its first token."""

    def __init__(self, server: Server, tokens: int) -> None:
        super().__init__(daemon=True)
        self._server, self._tokens = server, tokens
        self.begun = threading.Event()
        self.chunks: list[dict[str, Any]] = []
        self.start()

    def run(self) -> None:
        body = {"model": "moe", "prompt": [5, 6, 7], "max_tokens": self._tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
        with httpx.stream("POST", f"{self._server.url}/v1/completions", json=body, timeout=120) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    self.chunks.append(json.loads(line[6:])["choices"][0])
                    self.begun.set()

    def result(self) -> tuple[int, str]:
        """How many tokens came, and why it ended."""
        self.join(120)
        return sum(len(chunk["token_ids"] or ()) for chunk in self.chunks), self.chunks[-1]["finish_reason"]
