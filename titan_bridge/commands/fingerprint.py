"""`titan-bridge fingerprint`: one number a tensor that does not depend on format or layout."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from titan_bridge.commands.infer import Text
from titan_bridge.commands.progress import Bars
from titan_bridge.errors import BridgeError

if TYPE_CHECKING:
    from titan_bridge.checkpoint.compare import Side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Print a fingerprint of each tensor of a checkpoint, or compare two checkpoints by them.

    The same weights have the same fingerprints in every format and layout; a single bit that differs changes them. With
    A and B it names the tensors that differ, and exits with 1 if there are any. `titan-bridge diff` says by how much.

    Example: titan-bridge fingerprint out/demo/qwen3_moe_ep2
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Checkpoint: a model folder in any format, a training run, or one step of it."""
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

        config = None if self.config is None else read_config(Path(self.config))
        if self.config is not None and config is None:
            raise BridgeError(f"--config {self.config} has no config.json")
        dtype = getattr(torch, self.dtype) if self.dtype else None
        paths = [self.a] if self.b is None else [self.a, self.b]
        sides = compare.open_sides(paths, config=config, common=True)
        try:
            with Bars({"read": sum(side.source.nbytes for side in sides)}) as bars:
                found = [
                    dict(compare.fingerprints(side, dtype=dtype, advance=lambda n: bars.advance("read", n)))
                    for side in sides
                ]
        finally:
            for side in sides:
                side.source.close()
        if self.b is None:
            self._print(sides[0], found[0])
            return 0
        return self._compare(*found)

    def _print(self, side: Side, found: dict[str, int]) -> None:
        from titan_bridge.sharding.layout import dtype_name

        if self.json:
            tensors = {name: f"{number:016x}" for name, number in found.items()}
            facts = {"path": self.a, "fingerprint": whole(found), "tensors": tensors}
            print(json.dumps(facts | {"left_out": list(side.left_out)}))
            return
        for name, number in found.items():
            tensor = side.tensors[name]
            floating = self.dtype if tensor.dtype.is_floating_point else None
            print(f"{number:016x}  {name}  {floating or dtype_name(tensor.dtype)} {list(tensor.shape)}")
        if side.left_out:
            print(f"not in it: {', '.join(side.left_out)}")
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


def whole(found: dict[str, int]) -> str:
    """One fingerprint of all tensors, in hexadecimal: of their names and fingerprints, in the order of the names."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(found):
        digest.update(f"{name} {found[name]:016x}\n".encode())
    return digest.hexdigest()
