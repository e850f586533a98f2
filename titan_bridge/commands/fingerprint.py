"""`titan-bridge fingerprint`: one number a tensor that does not depend on format or layout."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Annotated, Any, Literal

import tyro

from titan_bridge.cli import imports
from titan_bridge.commands.infer import Text
from titan_bridge.commands.progress import Bars
from titan_bridge.errors import BridgeError

_SECONDS = 600
"""For an engine's answer: it reads all its weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Print a fingerprint of each tensor of a checkpoint or a running engine, or compare two of them.

    The same weights have the same fingerprints in every format and layout; a single bit that differs changes them. With
    A and B it names the tensors that differ, and exits with 1 if there are any. `titan-bridge diff` says by how much.

    Example: titan-bridge fingerprint out/demo/qwen3_moe_ep2
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Checkpoint: a model folder in any format, a training run, or one step of it; or the URL of a running engine
    (`titan-bridge serve ... --sharding-spec`)."""
    b: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[B]", help_behavior_hint="")] = None
    """Another one, to compare with."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16,float16}", help_behavior_hint=""),
    ] = None
    """Cast weights to it first, as serving or `reshard --dtype` would."""
    config: Text = None
    """Where no side has a config.json: a directory with one, which names the model."""
    names: Annotated[Text, tyro.conf.arg(metavar="PATTERN")] = None
    """Where another program wrote A: how it calls the tensor NAME, with {} in place of NAME, for example
    'state.model.{}'; tensors that do not fit are left out."""
    names_b: Annotated[Text, tyro.conf.arg(metavar="PATTERN")] = None
    """The same of B."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        if self.b is None and self.names_b is not None:
            raise BridgeError("--names-b is of B, and only A is given; leave it out")
        sources = [self.a] if self.b is None else [self.a, self.b]
        folders = [source for source in sources if not _is_url(source)]
        found = self._of_folders(folders) if folders else {}
        found |= {source: (self._of_engine(source), []) for source in sources if _is_url(source)}
        if self.b is None:
            self._print(*found[self.a])
            return 0
        return self._compare(found[self.a][0], found[self.b][0])

    def _of_folders(self, folders: list[str]) -> dict[str, tuple[dict[str, str], list[str]]]:
        """By folder: fingerprints by tensor, in hexadecimal, and tensors that have none."""
        with imports():
            import torch  # with what follows, two seconds that a bad flag need not wait for

            from titan_bridge.checkpoint import compare

        dtype = getattr(torch, self.dtype) if self.dtype else None
        patterns = {self.b: self.names_b, self.a: self.names}
        sides = compare.open_sides(
            folders, config=self.config, common=True, names=[patterns[folder] for folder in folders]
        )
        result = {}
        try:
            with Bars({"read": sum(side.source.nbytes for side in sides)}) as bars:
                for folder, side in zip(folders, sides, strict=True):
                    numbers = compare.fingerprints(
                        side, dtype=dtype, advance=lambda n: bars.advance("read", n)
                    )
                    result[folder] = {name: f"{number:016x}" for name, number in numbers}, list(side.left_out)
        finally:
            for side in sides:
                side.source.close()
        return result

    def _of_engine(self, url: str) -> dict[str, str]:
        import httpx  # only where a server is asked

        query = {"dtype": self.dtype} if self.dtype else {}
        try:
            answer = httpx.get(f"{url.rstrip('/')}/v1/fingerprints", params=query, timeout=_SECONDS)
        except httpx.HTTPError as error:
            raise BridgeError(f"{url}: {error}") from None
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise BridgeError(f"{url} has no route /v1/fingerprints; serve with --sharding-spec")
        try:
            said = answer.json()
            return {str(name): str(value) for name, value in said["tensors"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BridgeError(f"{url} answers {answer.status_code}: {answer.text[:300]}") from None

    def _print(self, found: dict[str, str], left_out: list[str]) -> None:
        if self.json:
            facts = {"path": self.a, "fingerprint": whole(found), "tensors": found, "left_out": left_out}
            print(json.dumps(facts))
            return
        for name, number in found.items():
            print(f"{number}  {name}")
        if left_out:
            print(f"not in it: {', '.join(left_out)}")
        print(f"{whole(found)}  {self.a}: {len(found):,} tensors")

    def _compare(self, a: dict[str, str], b: dict[str, str]) -> int:
        facts: dict[str, Any] = {
            "a": self.a,
            "b": self.b,
            "fingerprints": [whole(a), whole(b)],
            "only_a": [name for name in a if name not in b],
            "only_b": [name for name in b if name not in a],
            "different": [name for name in a if name in b and a[name] != b[name]],
        }
        equal = not (facts["only_a"] or facts["only_b"] or facts["different"])
        if self.json:
            print(json.dumps(facts | {"equal": equal}))
            return 0 if equal else 1
        for what, line in (
            ("only_a", f"only in {self.a}"),
            ("only_b", f"only in {self.b}"),
            ("different", "different"),
        ):
            for name in facts[what]:
                print(f"{line}: {name}")
        print(
            f"{'equal' if equal else 'different'}: {whole(a)} and {whole(b)}, {len(a):,} and {len(b):,} tensors"
        )
        return 0 if equal else 1


def whole(found: dict[str, str]) -> str:
    """One fingerprint of all tensors, in hexadecimal: of their names and fingerprints, in the order of the names."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(found):
        digest.update(f"{name} {found[name]}\n".encode())
    return digest.hexdigest()


def _is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))
