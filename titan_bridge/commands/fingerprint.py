"""`titan-bridge fingerprint`: one number a tensor that does not depend on format or layout."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from titan_bridge.commands.infer import Text
from titan_bridge.commands.progress import Bars
from titan_bridge.errors import BridgeError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Print a fingerprint of each tensor of a checkpoint, or compare two checkpoints by them.

    The same weights have the same fingerprints in every format and layout; a single bit that differs changes them. With
    A and B it names the tensors that differ, and exits with 1 if there are any. `titan-bridge diff` says by how much.
    A running engine is asked by its address (`titan-bridge serve --sharding-spec`); its weights have the dtype that it
    serves, so give --dtype for a checkpoint in another one.

    Example: titan-bridge fingerprint out/demo/qwen3_moe_ep2
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Checkpoint: a model folder in any format, a training run, or one step of it; or http://HOST:PORT."""
    b: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[B]", help_behavior_hint="")] = None
    """Another one, to compare with."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16,float16}", help_behavior_hint=""),
    ] = None
    """Cast weights to it first, as serving or `reshard --dtype` would."""
    config: Text = None
    """Where no side has a config.json: a directory with one, which names the model."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        import torch  # with what follows, two seconds that a bad flag need not wait for

        from titan_bridge.checkpoint import compare
        from titan_bridge.checkpoint.hf import read_config
        from titan_bridge.sharding.layout import dtype_name

        config = None if self.config is None else read_config(Path(self.config))
        if self.config is not None and config is None:
            raise BridgeError(f"--config {self.config} has no config.json")
        dtype = getattr(torch, self.dtype) if self.dtype else None
        paths = [self.a] if self.b is None else [self.a, self.b]
        folders = list(dict.fromkeys(path for path in paths if not is_url(path)))
        answers = {path: ask(path) for path in paths if is_url(path)}
        sides = dict(zip(folders, compare.open_sides(folders, config=config, common=True), strict=True))
        try:
            with Bars({"read": sum(side.source.nbytes for side in sides.values())}) as bars:
                own = {
                    path: dict(
                        compare.fingerprints(side, dtype=dtype, advance=lambda n: bars.advance("read", n))
                    )
                    for path, side in sides.items()
                }
        finally:
            for side in sides.values():
                side.source.close()
        found = own | {
            path: {name: int(one["fingerprint"], 16) for name, one in answer.items()}
            for path, answer in answers.items()
        }
        if self.b is not None:
            return self._compare(found[self.a], found[self.b])
        if self.a in answers:
            kinds = {name: (one["dtype"], one["shape"]) for name, one in answers[self.a].items()}
            left_out = []
        else:
            side = sides[self.a]
            left_out = list(side.left_out)
            kinds = {
                name: (
                    self.dtype if self.dtype and tensor.dtype.is_floating_point else dtype_name(tensor.dtype),
                    list(tensor.shape),
                )
                for name, tensor in side.tensors.items()
            }
        self._print(found[self.a], kinds, left_out)
        return 0

    def _print(
        self, found: dict[str, int], kinds: dict[str, tuple[str, list[int]]], left_out: list[str]
    ) -> None:
        if self.json:
            tensors = {name: f"{number:016x}" for name, number in found.items()}
            facts = {"path": self.a, "fingerprint": whole(found), "tensors": tensors, "left_out": left_out}
            print(json.dumps(facts))
            return
        for name, number in found.items():
            dtype, shape = kinds[name]
            print(f"{number:016x}  {name}  {dtype} {shape}")
        if left_out:
            print(f"not in it: {', '.join(left_out)}")
        print(f"{whole(found)}  {self.a}: {len(found):,} tensors")

    def _compare(self, a: dict[str, int], b: dict[str, int]) -> int:
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


def is_url(path: str) -> bool:
    """Whether a running engine is meant."""
    return path.startswith(("http://", "https://"))


def ask(url: str) -> dict[str, dict[str, Any]]:
    """What an engine's workers say of the weights that they hold, by Hugging Face name.

    `VLLM_API_KEY` is sent where it is set. Raises BridgeError where nobody answers, or without the route.
    """
    address = url.rstrip("/") + "/v1/fingerprints"
    key = os.environ.get("VLLM_API_KEY")
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        what = (
            "serve with `titan-bridge serve --sharding-spec`" if error.code == 404 else error.read().decode()
        )
        raise BridgeError(f"{address} answers {error.code}: {what}") from None
    except (OSError, ValueError) as error:
        raise BridgeError(f"{address} does not answer: {error}") from None


def whole(found: dict[str, int]) -> str:
    """One fingerprint of all tensors, in hexadecimal: of their names and fingerprints, in the order of the names."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(found):
        digest.update(f"{name} {found[name]:016x}\n".encode())
    return digest.hexdigest()
