"""A view: one external (Hugging Face) tensor as a slice of a reshape of one TorchTitan tensor.

    external == titan.reshape(flat factors)[index].permute(permute).reshape(shape)

No arithmetic happens on the way, so a view can be read, written, and cut by a sharding without the rest of
the tensor. Three examples, with the TorchTitan tensor on the left:

- q of a fused `wqkv [n_kv * R * head_dim, dim]`: factors ((n_kv, R, head_dim), (dim,)), index R in [0, R -
  2);
- one expert of `w1_EFD [E, F, D]`: factors ((E,), (F,), (D,)), index ((e, e + 1), (0, F), (0, D)), shape (F,
  D);
- rotary halves: factors ((n_heads, head_dim / 2, 2), (dim,)), permute (0, 2, 1, 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from titan_bridge.errors import BridgeError
from titan_bridge.sharding.boxes import Box


@dataclass(frozen=True, kw_only=True)
class View:
    """See the module's text. Shapes are global; all fields are tuples, so a view is hashable."""

    name: str  # external name, for example "model.layers.0.self_attn.q_proj.weight"
    fqn: str  # name of the TorchTitan tensor, for example "layers.0.attention.qkv_linear.wqkv.weight"
    shape: tuple[int, ...]  # shape of the external tensor
    factors: tuple[tuple[int, ...], ...]
    """For each dim of the TorchTitan tensor its row-major factorisation; the product is the size of the dim."""
    index: tuple[tuple[int, int], ...]
    """Half-open interval for each factored dim, in the order of `factors` laid flat."""
    permute: tuple[int, ...] = ()
    """Order in which the factored dims appear in the external tensor; empty means unchanged."""

    def __post_init__(self) -> None:
        flat = self.flat_factors
        if not self.permute:
            object.__setattr__(self, "permute", tuple(range(len(flat))))
        wrong = None
        if any(not dim for dim in self.factors) or any(size < 1 for size in flat):
            wrong = f"factors {self.factors} must name at least one size >= 1 for each dim"
        elif len(self.index) != len(flat):
            wrong = f"{len(self.index)} intervals in index for {len(flat)} factored dims"
        elif outside := [(*e, n) for e, n in zip(self.index, flat, strict=True) if not 0 <= e[0] < e[1] <= n]:
            wrong = "index [{}, {}) is not inside a factored dim of size {}".format(*outside[0])
        elif sorted(self.permute) != list(range(len(flat))):
            wrong = f"permute {self.permute} is not an order of {len(flat)} factored dims"
        elif math.prod(self.shape) != math.prod(self.index_shape):
            wrong = f"shape {self.shape} does not hold the {self.index_shape} that index selects"
        if wrong:
            raise BridgeError(f"{self.name}: {wrong}")
        _ = self.groups  # raises where the dims do not fit

    @classmethod
    def identity(cls, name: str, fqn: str, shape: tuple[int, ...]) -> View:
        """The view of a tensor that is the same on both sides, apart from its name."""
        factors, index = tuple((size,) for size in shape), tuple((0, size) for size in shape)
        return cls(name=name, fqn=fqn, shape=tuple(shape), factors=factors, index=index)

    @classmethod
    def first_rows(cls, name: str, shape: tuple[int, ...], rows: int) -> View:
        """The first `rows` of a tensor of `shape` under the same name: the rest pads the vocabulary."""
        factors, index = tuple((size,) for size in shape), ((0, rows), *((0, size) for size in shape[1:]))
        return cls(name=name, fqn=name, shape=(rows, *shape[1:]), factors=factors, index=index)

    @property
    def flat_factors(self) -> tuple[int, ...]:
        """Sizes of all factored dims."""
        return tuple(size for dim in self.factors for size in dim)

    @property
    def index_shape(self) -> tuple[int, ...]:
        """Sizes of the factored dims after indexing, before `permute`."""
        return tuple(stop - start for start, stop in self.index)

    @property
    def titan_shape(self) -> tuple[int, ...]:
        """Global shape of the TorchTitan tensor."""
        return tuple(math.prod(dim) for dim in self.factors)

    @property
    def is_identity(self) -> bool:
        """True when both tensors have the same elements in the same places."""
        return (
            self.shape == self.titan_shape
            and self.permute == tuple(range(len(self.index)))
            and self.index_shape == self.flat_factors
        )

    def read(self, titan: torch.Tensor) -> torch.Tensor:
        """The external tensor cut out of the global TorchTitan tensor; a view of its memory where torch can
        make one."""
        self._check(titan, self.titan_shape, self.fqn)
        cut = titan.reshape(self.flat_factors)[tuple(slice(a, b) for a, b in self.index)]
        return cut.permute(self.permute).reshape(self.shape)

    def write(self, titan: torch.Tensor, external: torch.Tensor, *, first: int = 0) -> None:
        """Copy `external` into its place in the global TorchTitan tensor (contiguous), casting to its dtype.
        `titan` may be a part of its rows, from `first` on, as for `part`; the rest of `external` is left out, and may
        be missing: what `part` says is enough."""
        box = self.part(first, len(titan))
        self._check(titan, (len(titan), *self.titan_shape[1:]), self.fqn)
        if box is None or tuple(external.shape) != box.shape:
            self._check(external, self.shape, self.name)
        if box is None:
            return
        if tuple(external.shape) != box.shape:
            external = external[box.slices]
        start, stop = self._common(first, len(titan))
        count, (low, high), begin = len(titan) // self.rows, self.index[0], first // self.rows
        place = [slice(start - begin, stop - begin), *(slice(a, b) for a, b in self.index[1:])]
        cut = titan.view(count, *self.flat_factors[1:])[tuple(place)].permute(self.permute)
        held = (start, stop) if self._outer is not None else (low, high)
        sizes = [held[1] - held[0] if dim == 0 else self.index_shape[dim] for dim in self.permute]
        whole = external.reshape(sizes)
        cut.copy_(whole.narrow(self.permute.index(0), start - held[0], stop - start))

    def part(self, first: int, count: int) -> Box | None:
        """The external tensor's box with what lies in `count` rows of the TorchTitan tensor from `first` on, both
        multiples of `rows`; None: nothing. It is the whole tensor where these rows are not together in it."""
        last = first + count
        if first % self.rows or last % self.rows or last > self.titan_shape[0]:
            what = f"rows {first} to {last} of {self.titan_shape[0]}"
            raise BridgeError(f"{self.fqn}: {what}; this view needs multiples of {self.rows}")
        start, stop = self._common(first, count)
        if start >= stop:
            return None
        box = Box.whole(self.shape)
        if (dim := self._outer) is None:
            return box
        low, each = self.index[0][0], math.prod(self.index_shape[inner] for inner in self.groups[dim][1:])
        ends = [list(box.start), list(box.stop)]
        ends[0][dim], ends[1][dim] = (start - low) * each, (stop - low) * each
        return Box(start=tuple(ends[0]), stop=tuple(ends[1]))

    def _common(self, first: int, count: int) -> tuple[int, int]:
        """Which of the first factored dim these rows and the view have in common; empty: start >= stop."""
        (low, high), begin = self.index[0], first // self.rows
        return max(low, begin), min(high, begin + count // self.rows)

    @property
    def _outer(self) -> int | None:
        """The external dim of which the first factored dim is the outermost part; None: there is none."""
        return next((dim for dim, group in enumerate(self.groups) if group[:1] == (0,)), None)

    @property
    def rows(self) -> int:
        """Rows of the TorchTitan tensor that stay together where it is cut along its first factored dim."""
        return math.prod(self.factors[0][1:])

    def _check(self, tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
        if tuple(tensor.shape) != shape:
            raise BridgeError(f"{name} has shape {tuple(tensor.shape)}; this view needs {shape}")

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """For each dim of the external tensor, the factored dims that it is made of, row-major (those of size 1 left
        out). A dim may not straddle two runs of them."""
        sizes = self.index_shape
        rest = [dim for dim in self.permute if sizes[dim] > 1]
        groups = []
        for size in self.shape:
            group, product = [], 1
            while rest and product < size:
                group.append(rest.pop(0))
                product *= sizes[group[-1]]
            if product != size:
                raise BridgeError(
                    f"{self.name}: external dim of size {size} in {self.shape} is no product of neighbouring "
                    f"factored dims {tuple(sizes[dim] for dim in self.permute)}; factor the dims further"
                )
            groups.append(tuple(group))
        return tuple(groups)
