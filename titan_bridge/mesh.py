"""Parallel sizes and the named meshes that they make, for any number of ranks and without a process group.

One vocabulary for both sides. vLLM's (dp, tp, expert parallel or not) and TorchTitan's ``ParallelDims``
describe the same ranks: ``rank = ((pp_rank * dp_replicate + replica) * dp + dp_rank) * tp + tp_rank``. The
dense mesh unflattens them as (dp_replicate, fsdp, tp), the sparse mesh as (dp_replicate, efsdp, ep), so that
the ep axis runs over consecutive ranks, first through tp and then through dp.

A pipeline stage has a dense and a sparse mesh of its own: ``dense_pp1`` is that of stage 1. What several stages hold
(a tied embedding) lives on a mesh of all of them, ``dense_pp0_3``, with the axis pp in front. vLLM numbers the stages
inside of data parallelism (`Sizes.dp_outside`), TorchTitan outside.

A module may be cut over fewer ranks than tp: over ``width`` consecutive ones, and be replicated over the rest. Its
parameters live on the mesh ``dense_tp{width}`` with the axes (dp_replicate, fsdp, tp_replicate, tp). `Sizes.at` says
for each module which axes it has; nothing outside of this file knows which axes exist.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from titan_bridge.errors import BridgeError

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder

DENSE, SPARSE = "dense", "sparse"

DEGREES = ("dp", "tp", "ep", "pp")
"""What a user sets, by these names in every command and file; each is a field of `Sizes`."""
NARROW = "dense_tp"
"""Beginning of the name of a dense mesh whose tp axis is subdivided; its width follows."""

_MESHES: dict[str, tuple[str, ...]] = {
    DENSE: ("dp_replicate", "fsdp", "tp"),
    SPARSE: ("dp_replicate", "efsdp", "ep"),
    "dp": ("dp",),
    "tp": ("tp",),
    "ep": ("ep",),
    "pp": ("pp",),
}
_STAGED = re.compile(r"(.+?)_pp(\d+(?:_\d+)*)")
_NARROW_AXES = ("dp_replicate", "fsdp", "tp_replicate", "tp")
MESHES = tuple(_MESHES)
"""Names of the meshes that there always are."""

MOST_RANKS = 1 << 18
"""A layout lists its ranks, so a size that is a slip of the hand would cost minutes and gigabytes."""


def mesh_axes(name: str) -> tuple[str, ...]:
    """The axes of the mesh called ``name``. Raises BridgeError where there is none of that name."""
    base, stages = base_and_stages(name)
    front = ("pp",) if len(stages) > 1 else ()
    if base in _MESHES and not (stages and len(_MESHES[base]) == 1):
        return (*front, *_MESHES[base])
    if narrow_width(base) is not None:
        return (*front, *_NARROW_AXES)
    raise BridgeError(f"there is no mesh {name!r}; allowed: {_listed(MESHES)} and {NARROW}WIDTH")


def base_and_stages(name: str) -> tuple[str, tuple[int, ...]]:
    """("dense", (0, 3)) for "dense_pp0_3"; no stages for a mesh that belongs to none."""
    match = _STAGED.fullmatch(name)
    return (match[1], tuple(map(int, match[2].split("_")))) if match else (name, ())


def on_stages(name: str, stages: Sequence[int]) -> str:
    """The reverse of `base_and_stages`."""
    return f"{name}_pp{'_'.join(map(str, stages))}" if stages else name


def narrow_width(name: str) -> int | None:
    """2 for "dense_tp2"; None for any other mesh."""
    width = name.removeprefix(NARROW)
    return int(width) if width != name and width.isdecimal() else None


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Mesh names as they are listed everywhere: the narrow ones last, the widest of them first; then by stage."""

    def place(name: str) -> tuple:
        base, stages = base_and_stages(name)
        width = narrow_width(base)
        return (MESHES.index(base), 0, stages) if width is None else (len(MESHES), -width, stages)

    return tuple(sorted(set(names), key=place))


def shard_axis(name: str) -> str:
    """The axis of a dense or the sparse mesh that FSDP may shard."""
    return "efsdp" if base_and_stages(name)[0] == SPARSE else "fsdp"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parallel degrees of a model, or of one of its modules (`at`), and what they say about its axes.

    ``dp`` is vLLM's data parallelism, the axis that FSDP may shard (``dp_shard``).

    Raises:
        BridgeError: A size below 1, more than `MOST_RANKS` ranks, an ``ep`` that does not divide ``dp * tp``, or
            ``stages`` that are not ``pp``.
    """

    dp: int = 1
    tp: int = 1
    ep: int = 1
    dp_replicate: int = 1
    pp: int = 1
    tp_replicate: int = 1
    """Groups of ``tp`` consecutive ranks that hold the same part of a module; 1 for a model as a whole."""
    widths: tuple[tuple[str, int], ...] = ()
    """FQN of each module that is cut over fewer ranks than tp, and how many."""
    stages: tuple[int, ...] = ()
    """How many layers each pipeline stage has; nothing where there is one stage, or where it is not known."""
    dp_outside: bool = False
    """Whether ranks are numbered as vLLM does, ``(dp_rank * pp + stage) * tp + tp_rank``."""

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "ep", "dp_replicate", "pp", "tp_replicate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BridgeError(f"{name}={value!r} is not a size; give an integer of at least 1")
        if self.world > MOST_RANKS:
            raise BridgeError(
                f"dp={self.dp}, tp={self.tp}: {self.world} ranks; at most {MOST_RANKS} are allowed"
            )
        if self.most_ep % self.ep:
            raise BridgeError(
                f"ep={self.ep} does not divide dp*tp={self.most_ep}; "
                f"allowed with dp={self.dp}, tp={self.tp}: {_listed(divisors(self.most_ep))}"
            )
        if self.stages and (len(self.stages) != self.pp or min(self.stages) < 1):
            raise BridgeError(
                f"stages of {_listed(self.stages)} layers; give at least 1 to each of pp={self.pp}"
            )

    @classmethod
    def of(cls, options: Any) -> Sizes:
        """Of an engine, from whatever has the `DEGREES` as attributes: a command, a table of a TOML file."""
        return cls(**{name: getattr(options, name) for name in DEGREES}, dp_outside=options.pp > 1)

    @property
    def degrees(self) -> dict[str, int]:
        """The `DEGREES` by name; pp where there are stages."""
        return {name: getattr(self, name) for name in DEGREES if name != "pp" or self.pp > 1}

    @property
    def axes(self) -> dict[str, int]:
        """Size of each axis of the dense and the sparse mesh, by name, and pp where there are stages."""
        stages = {"pp": self.pp} if self.pp > 1 else {}
        return {axis: self.axis(axis) for name in (DENSE, SPARSE) for axis in mesh_axes(name)} | stages

    @property
    def counts(self) -> dict[str, int]:
        """All degrees of the model by name."""
        return {**self.degrees, "dp_replicate": self.dp_replicate, "pp": self.pp}

    @property
    def most_ep(self) -> int:
        """The largest ep: all ranks of a stage and replica."""
        return self.dp * self.tp_replicate * self.tp

    @property
    def fsdp(self) -> int:
        return self.dp

    @property
    def efsdp(self) -> int:
        """Ranks that hold the same experts, over which FSDP may shard them further."""
        return self.most_ep // self.ep

    @property
    def world(self) -> int:
        return self.pp * self.dp_replicate * self.most_ep

    @property
    def dense_mesh(self) -> str:
        """Name of the mesh of dense parameters that tp shards."""
        return DENSE if self.tp_replicate == 1 else f"{NARROW}{self.tp}"

    @property
    def meshes(self) -> tuple[str, ...]:
        """Names of all meshes that parameters of the model may live on, and of those of one axis."""
        narrow = {width for _, width in self.widths} - {1, self.tp}
        return in_order([*MESHES, *(f"{NARROW}{width}" for width in narrow)])

    def axis(self, name: str) -> int:
        """Size of a mesh axis. Raises BridgeError for a name that no mesh has."""
        if name == "dp":
            # The 1-D mesh runs over replicas, too.
            return self.dp_replicate * self.dp
        axes = dict.fromkeys(axis for axes in (*_MESHES.values(), _NARROW_AXES) for axis in axes)
        if name not in axes:
            raise BridgeError(f"there is no mesh axis {name!r}; allowed: {_listed(sorted(axes))}")
        return getattr(self, name)

    def narrowed(self, width: int) -> Sizes:
        """For a module that is cut over ``width`` consecutive ranks. Raises BridgeError where it does not divide tp."""
        tp = self.tp * self.tp_replicate
        if width < 1 or tp % width:
            raise BridgeError(f"width {width} does not divide tp={tp}; allowed: {_listed(divisors(tp))}")
        return replace(self, tp=width, tp_replicate=tp // width, widths=())

    def at(self, fqn: str) -> Sizes:
        """The degrees of the module ``fqn``: those of the nearest module around it (or itself) that has a width."""
        known = self._narrow
        while known and fqn:
            if fqn in known:
                return known[fqn]
            fqn = fqn.rpartition(".")[0]
        return self

    def stages_of(self, fqn: str, *, tied: bool = False) -> tuple[int, ...]:
        """The pipeline stages that hold the parameter or module ``fqn``; empty where there are no stages.

        The embedding is in the first stage, the last norm and the head in the last; ``tied``: the embedding is the
        head, too.
        """
        if not self.stages:
            return ()
        first, _, rest = fqn.partition(".")
        if first == "layers":
            index = int(rest.partition(".")[0])
            return (next(stage for stage, end in enumerate(accumulate(self.stages)) if index < end),)
        if first == "tok_embeddings":
            return (0, self.pp - 1) if tied else (0,)
        return (self.pp - 1,)

    def layers_of(self, stage: int) -> range:
        """The layers of a stage. Only where `stages` is known."""
        first = sum(self.stages[:stage])
        return range(first, first + self.stages[stage])

    def ranks_of(self, stage: int) -> Sequence[int]:
        """The ranks of a stage, in the order of its meshes."""
        count, width = self.world // self.pp, self.tp_replicate * self.tp
        if not self.dp_outside:
            return range(stage * count, (stage + 1) * count)
        groups = range(self.dp_replicate * self.dp)
        return [(group * self.pp + stage) * width + tp for group in groups for tp in range(width)]

    def stage_at(self, rank: int) -> int:
        """The stage that a rank belongs to."""
        if self.dp_outside:
            return rank // (self.tp_replicate * self.tp) % self.pp
        return rank // (self.world // self.pp)

    @cached_property
    def _narrow(self) -> dict[str, Sizes]:
        by_width = {width: self.narrowed(width) for width in {width for _, width in self.widths}}
        return {fqn: by_width[width] for fqn, width in self.widths}


@dataclass(frozen=True, kw_only=True)
class NamedMesh:
    """A mesh as plain numbers. ``ranks`` is nested as the mesh is: ``ranks[i][j][k]`` for three axes."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    ranks: tuple[Any, ...]

    def flat_ranks(self) -> tuple[int, ...]:
        """Ranks in row-major order of the axes."""
        flat: Iterable[Any] = self.ranks
        for _ in self.axes[1:]:
            flat = (item for row in flat for item in row)
        return tuple(flat)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Position of ``rank`` on each axis. Raises BridgeError when it is not in the mesh."""
        flat = self.flat_ranks()
        if rank not in flat:
            raise BridgeError(f"rank {rank} is not in mesh {self.name!r}; its ranks are {_listed(flat)}")
        place, coordinate = flat.index(rank), []
        for size in reversed(self.shape):
            place, position = divmod(place, size)
            coordinate.append(position)
        return tuple(reversed(coordinate))


def describe(name: str, sizes: Sizes, *, rank: int = 0) -> NamedMesh:
    """The mesh called ``name``: that of its stages, else the one that ``rank`` belongs to.

    Raises:
        BridgeError: An unknown name or stage, or a rank outside the world.
    """
    axes, (base, stages) = mesh_axes(name), base_and_stages(name)
    if (width := narrow_width(base)) is not None:
        sizes = sizes.narrowed(width)
    if not 0 <= rank < sizes.world:
        raise BridgeError(
            f"rank {rank} is outside the world of {sizes.world}; allowed: 0 to {sizes.world - 1}"
        )
    if stages and max(stages) >= sizes.pp:
        raise BridgeError(f"mesh {name!r} is of stage {max(stages)}; there are {sizes.pp}")
    mine = sizes.stage_at(rank)
    own = sizes.ranks_of(mine)
    place = own.index(rank)
    shape = tuple(sizes.axis(axis) for axis in axes)
    if name == "pp":
        flat: Sequence[int] = [sizes.ranks_of(stage)[place] for stage in range(sizes.pp)]
    elif len(axes) == 1:
        # The line of ranks through `rank` along the axis: neighbours are a step apart.
        step = sizes.tp if name == "dp" else 1
        count = sizes.axis(name)
        start = place - (place // step % count) * step
        flat = own[start : start + step * count : step]
    else:
        if len(stages) > 1:
            shape = (len(stages), *shape[1:])
        flat = [rank for stage in stages or (mine,) for rank in sizes.ranks_of(stage)]
    return NamedMesh(name=name, axes=axes, shape=shape, ranks=_nest(tuple(flat), shape))


@dataclass(frozen=True, kw_only=True)
class ShardPlacement:
    """Which mesh a parameter belongs to, and which of its dims that mesh's fsdp or efsdp axis shards."""

    mesh: Literal["dense", "sparse"]
    dim: int = 0


def padded_vocab(vocab: int, sizes: Sizes) -> int:
    """Rows that an embedding or head of ``vocab`` rows needs so that tp divides them."""
    return math.ceil(vocab / sizes.tp) * sizes.tp


def check_divides(config: Decoder.Config, sizes: Sizes, *, narrows: bool = False) -> None:
    """Check every size in a TorchTitan config tree that an axis must divide: heads, hidden sizes, experts.

    The vocabulary is not checked: see ``padded_vocab``.

    Args:
        narrows: Attention is cut over fewer ranks where its key-value heads ask for it, as a policy does: they need
            not divide.

    Raises:
        BridgeError: One line with every size that does not divide, and what is allowed instead; or attention or
            experts that nobody here knows how to divide.
    """
    # Imported here because describing meshes must not cost the import of TorchTitan.
    from titan_bridge.models.adapters import divisions  # noqa: PLC0415

    by_axis: dict[tuple[str, int], dict[str, int]] = {}
    for fqn, division in divisions(config, sizes):
        if narrows and division.narrows:
            continue
        axis = division.axis, sizes.at(fqn).axis(division.axis)
        by_axis.setdefault(axis, {})[f"{division.name}={division.size}"] = division.size
    problems = []
    for (axis, count), wanted in by_axis.items():
        bad = [name for name, size in wanted.items() if size % count]
        if not bad:
            continue
        where, allowed = "for this model", divisors(math.gcd(*wanted.values()))
        if axis == "ep":
            where = f"with dp={sizes.dp}, tp={sizes.tp}"
            allowed = tuple(n for n in allowed if sizes.most_ep % n == 0)
        problems.append(
            f"{axis}={count} does not divide {', '.join(bad)}; allowed {where}: {_listed(allowed)}"
        )
    if sizes.ep > 1 and not any(axis == "ep" for axis, _ in by_axis):
        problems.append(f"ep={sizes.ep} but the model has no experts; allowed: 1")
    if problems:
        raise BridgeError("; ".join(problems))


def sizes_of(parallel_config: Any, world: int, *, ep: int | None = None) -> Sizes:
    """The sizes in a vLLM ``ParallelConfig`` (read by attribute), or the given `Sizes` themselves.

    Args:
        world: Ranks in the default process group. vLLM runs data parallelism of a dense model as engines that
            do not know of each other; their world is tp ranks, and dp is 1 here.
        ep: Ranks that share the experts, if not all (``enable_expert_parallel``) or 1.

    Raises:
        BridgeError: Sizes that are not those of ``world``, or context parallelism.
    """
    if isinstance(parallel_config, Sizes):
        sizes = parallel_config
    else:
        tp, pp = parallel_config.tensor_parallel_size, parallel_config.pipeline_parallel_size
        context = getattr(parallel_config, "prefill_context_parallel_size", 1)
        if context > 1:
            raise BridgeError(f"prefill_context_parallel_size={context} has no mesh axis; allowed: 1")
        dp = 1 if world == tp * pp else parallel_config.data_parallel_size
        sizes = Sizes(dp=dp, tp=tp, pp=pp, dp_outside=pp > 1)
        if parallel_config.enable_expert_parallel or ep:
            sizes = replace(sizes, ep=ep or sizes.most_ep)
    if sizes.world != world:
        raise BridgeError(
            f"{sizes} is {sizes.world} ranks, but the process group has {world}; give its sizes"
        )
    return sizes


def divisors(number: int) -> tuple[int, ...]:
    """Divisors of a positive number in increasing order."""
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def _nest(flat: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    if len(shape) == 1:
        return flat
    step = len(flat) // shape[0]
    return tuple(_nest(flat[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0]))


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))
