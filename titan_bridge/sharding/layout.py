"""A layout: the placements of every parameter of a model, with the meshes they refer to; written as JSON.

    {"version": 1,
     "meshes": {"dense": {"axes": ["dp_replicate", "fsdp", "tp"], "shape": [1, 2, 2],
                          "ranks": [[[0, 1], [2, 3]]]}},
     "params": {"norm.weight": {"mesh": "dense", "placements": ["R", "S(0)", "R"],
                                "shape": [64], "dtype": "bfloat16"}}}

`ranks` is nested as the mesh is. A pipeline stage is a mesh of its own: its parameters name it, and the ranks
that are not on it hold nothing of them. A layout that comes of a parallelism policy states it as `parallelism`, for
people to read. Reading is strict: anything unknown, missing or contradictory is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from titan_bridge.errors import BridgeError, about
from titan_bridge.json_file import read_json_object
from titan_bridge.sharding.boxes import Piece, check
from titan_bridge.sharding.spec import ShardingSpec, placement_from_str, placement_to_str

VERSION = 1
_NUMBERS = "whole numbers"
T = TypeVar("T")


def torch_dtype(name: str) -> torch.dtype:
    """`torch.bfloat16` for "bfloat16". Raises BridgeError for what is no name of a dtype."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise BridgeError(f"dtype {name!r} is not a torch dtype, for example 'bfloat16'")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def itemsize(dtype: str) -> int:
    """Bytes an element of the dtype with this name. Raises as `torch_dtype`."""
    return torch_dtype(dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class MeshLayout:
    """A device mesh without devices: names and sizes of the axes, and the ranks on it."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]  # global ranks, row-major; as many as the mesh is large

    def __post_init__(self) -> None:
        if not self.axes or len(set(self.axes)) != len(self.axes) or len(self.axes) != len(self.shape):
            raise BridgeError(
                f"mesh axes {self.axes}, sizes {self.shape}; give one for each of distinct axes"
            )
        if not _are_ints(self.shape, least=1):
            raise BridgeError(f"mesh shape {self.shape}; every axis has at least size 1")
        if len(self.ranks) != math.prod(self.shape):
            size = math.prod(self.shape)
            raise BridgeError(f"{len(self.ranks)} ranks on a mesh of shape {self.shape}; it needs {size}")
        if len(set(self.ranks)) != len(self.ranks) or not _are_ints(self.ranks):
            raise BridgeError(f"the ranks of mesh {self.axes} must be distinct and not negative")

    @classmethod
    def make(cls, axes: Sequence[str], shape: Sequence[int], ranks: Any = None) -> MeshLayout:
        """A mesh of the given `ranks` (any nested sequence or array), or of ranks 0, 1, 2, ..."""
        flat = np.arange(math.prod(shape)) if ranks is None else np.asarray(ranks).reshape(-1)
        return cls(axes=tuple(axes), shape=tuple(int(n) for n in shape), ranks=tuple(flat.tolist()))

    @cached_property
    def array(self) -> np.ndarray:
        """The ranks as an int64 array of the shape of the mesh."""
        return np.asarray(self.ranks, dtype=np.int64).reshape(self.shape)

    @cached_property
    def _position(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.ranks)}

    def coordinate(self, rank: int) -> tuple[int, ...] | None:
        """Where `rank` stands on the mesh, or None when it is not on it."""
        position = self._position.get(rank)
        return None if position is None else tuple(int(c) for c in np.unravel_index(position, self.shape))

    def __str__(self) -> str:
        sizes = (f"{axis}={size}" for axis, size in zip(self.axes, self.shape, strict=True))
        return f"({', '.join(sizes)})"


@dataclass(frozen=True, kw_only=True)
class ParamLayout:
    """One parameter: global shape, dtype, mesh and placements (also when it is replicated)."""

    spec: ShardingSpec
    shape: tuple[int, ...]  # global shape, as served or trained
    dtype: str  # name of the torch dtype in storage, for example "bfloat16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not _are_ints(self.shape):
            raise BridgeError(f"shape {self.shape} is not a tensor's shape")
        itemsize(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the global tensor."""
        return math.prod(self.shape) * itemsize(self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} on {self.spec}"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Meshes and parameters by name. Raises BridgeError when they do not fit together."""

    meshes: Mapping[str, MeshLayout]
    params: Mapping[str, ParamLayout]
    parallelism: Mapping[str, Any] | None = field(default=None, compare=False)
    """The policy behind it, as plain tables; nothing reads it here."""

    def __post_init__(self) -> None:
        checked = set()
        for fqn, param in self.params.items():
            mesh = self.meshes.get(param.spec.mesh)
            if mesh is None:
                raise BridgeError(f"{fqn} lives on mesh {param.spec.mesh!r}; there are {sorted(self.meshes)}")
            # Most parameters of a large model look alike, and checking each costs seconds.
            if (key := (param.spec, len(param.shape))) not in checked:
                with about(fqn):
                    check(param.spec.placements, param.shape, mesh.shape)
                checked.add(key)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """All ranks of all meshes, sorted."""
        return tuple(sorted({rank for mesh in self.meshes.values() for rank in mesh.ranks}))

    def mesh_of(self, fqn: str) -> MeshLayout:
        """The mesh of a parameter."""
        return self.meshes[self.param(fqn).spec.mesh]

    def param(self, fqn: str) -> ParamLayout:
        """One parameter. Raises BridgeError when the layout has none of this name."""
        if fqn not in self.params:
            raise BridgeError(f"the layout has no parameter {fqn!r} (it has {len(self.params)} others)")
        return self.params[fqn]

    def pieces(self, fqn: str, rank: int) -> tuple[Piece, ...]:
        """What `rank` holds of `fqn`: global boxes and their places in its local tensor. Empty where it has nothing."""
        param, mesh = self.param(fqn), self.mesh_of(fqn)
        at = mesh.coordinate(rank)
        return () if at is None else param.spec.pieces(param.shape, mesh.shape, at)

    def local_shape(self, fqn: str, rank: int) -> tuple[int, ...] | None:
        """Shape of the local tensor of `rank`, or None when the rank is not on the parameter's mesh."""
        param, mesh = self.param(fqn), self.mesh_of(fqn)
        at = mesh.coordinate(rank)
        return None if at is None else param.spec.local_shape(param.shape, mesh.shape, at)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and ints, as in the module's text."""
        said = {} if self.parallelism is None else {"parallelism": dict(self.parallelism)}
        return {
            "version": VERSION,
            **said,
            "meshes": {
                name: {"axes": list(mesh.axes), "shape": list(mesh.shape), "ranks": mesh.array.tolist()}
                for name, mesh in self.meshes.items()
            },
            "params": {
                fqn: {
                    "mesh": param.spec.mesh,
                    "placements": [placement_to_str(placement) for placement in param.spec.placements],
                    "shape": list(param.shape),
                    "dtype": param.dtype,
                }
                for fqn, param in self.params.items()
            },
        }

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """The reverse of `to_json`. Raises BridgeError that names the first thing that is wrong."""
        said = {"parallelism"} & set(_dict(data, "layout"))
        _keys(data, {"version", "meshes", "params", *said}, "layout")
        if data["version"] != VERSION or isinstance(data["version"], bool):
            raise BridgeError(f"layout version {data['version']!r}; this release reads version {VERSION}")
        meshes = {name: _mesh(name, mesh) for name, mesh in _dict(data["meshes"], "meshes").items()}
        params = {fqn: _param(fqn, param) for fqn, param in _dict(data["params"], "params").items()}
        policy = _dict(data["parallelism"], "parallelism") if said else None
        return cls(meshes=meshes, params=params, parallelism=policy)

    def write(self, path: str | Path) -> None:
        """Write the JSON file at `path`."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Layout:
        """Read the JSON file at `path`. Raises BridgeError when it is not there or not a layout."""
        data = read_json_object(Path(path))
        with about(path):
            return cls.from_json(data)


def _are_ints(values: Iterable[Any], least: int = 0) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and n >= least for n in values)


def _dict(data: Any, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise BridgeError(f"{what} is {type(data).__name__}; it must be an object")
    return data


def _keys(data: Any, allowed: set[str], what: str) -> None:
    found = set(_dict(data, what))
    if found != allowed:
        wrong = [f"missing {name!r}" for name in sorted(allowed - found)]
        wrong += [f"unknown {name!r}" for name in sorted(found - allowed)]
        raise BridgeError(f"{what}: {', '.join(wrong)}; it has exactly the fields {sorted(allowed)}")


def _list(value: Any, kind: type[T], what: str, of: str) -> tuple[T, ...]:
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        raise BridgeError(f"{what} is {value!r}; it must be a list of {of}")
    return tuple(value)


def _mesh(name: str, data: Any) -> MeshLayout:
    _keys(data, {"axes", "shape", "ranks"}, f"mesh {name}")
    with about(f"mesh {name}"):
        axes, shape = _list(data["axes"], str, "axes", "names"), _list(data["shape"], int, "shape", _NUMBERS)
        level = [data["ranks"]]
        for size in shape:
            if not all(isinstance(row, list) and len(row) == size for row in level):
                raise BridgeError(f"ranks must be nested as the shape {list(shape)} says")
            level = [value for row in level for value in row]
        return MeshLayout(axes=axes, shape=shape, ranks=_list(level, int, "ranks", _NUMBERS))


def _param(fqn: str, data: Any) -> ParamLayout:
    _keys(data, {"mesh", "placements", "shape", "dtype"}, fqn)
    with about(fqn):
        placements = _list(data["placements"], str, "placements", "placements such as ['R', 'S(0)']")
        spec = ShardingSpec(mesh=data["mesh"], placements=tuple(map(placement_from_str, placements)))
        shape = _list(data["shape"], int, "shape", _NUMBERS)
        return ParamLayout(spec=spec, shape=shape, dtype=data["dtype"])
