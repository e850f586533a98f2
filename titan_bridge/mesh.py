"""Parallel sizes and the named meshes that they make, for any number of ranks and without a process group.

One vocabulary for both sides. vLLM's (dp, tp, expert parallel or not) and TorchTitan's ``ParallelDims``
describe the same ranks: ``rank = ((pp_rank * dp_replicate + replica) * dp + dp_rank) * tp + tp_rank``. The
dense mesh unflattens them as (dp_replicate, fsdp, tp), the sparse mesh as (dp_replicate, efsdp, ep), so that
the ep axis runs over consecutive ranks, first through tp and then through dp.

A module may be cut over fewer ranks than tp: over ``width`` consecutive ones, and be replicated over the rest. Its
parameters live on the mesh ``dense_tp{width}`` with the axes (dp_replicate, fsdp, tp_replicate, tp). `Sizes.at` says
for each module which axes it has; nothing outside of this file knows which axes exist.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from titan_bridge.errors import BridgeError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torchtitan.distributed import ParallelDims
    from torchtitan.models.common.decoder import Decoder

DENSE, SPARSE = "dense", "sparse"

DEGREES = ("dp", "tp", "ep")
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
_NARROW_AXES = ("dp_replicate", "fsdp", "tp_replicate", "tp")
MESHES = tuple(_MESHES)
"""Names of the meshes that there always are."""

MOST_RANKS = 1 << 18
"""A layout lists its ranks, so a size that is a slip of the hand would cost minutes and gigabytes."""


def mesh_axes(name: str) -> tuple[str, ...]:
    """The axes of the mesh called ``name``. Raises BridgeError where there is none of that name."""
    if name in _MESHES:
        return _MESHES[name]
    if narrow_width(name) is not None:
        return _NARROW_AXES
    raise BridgeError(f"there is no mesh {name!r}; allowed: {_listed(MESHES)} and {NARROW}WIDTH")


def narrow_width(name: str) -> int | None:
    """2 for "dense_tp2"; None for any other mesh."""
    width = name.removeprefix(NARROW)
    return int(width) if width != name and width.isdecimal() else None


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Mesh names as they are listed everywhere: the narrow ones last, the widest of them first."""
    narrow = {name: width for name in names if (width := narrow_width(name)) is not None}
    return (*(n for n in MESHES if n in set(names)), *sorted(narrow, key=narrow.__getitem__, reverse=True))


def shard_axis(name: str) -> str:
    """The axis of a dense or the sparse mesh that FSDP may shard."""
    return "efsdp" if name == SPARSE else "fsdp"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parallel degrees of a model, or of one of its modules (`at`), and what they say about its axes.

    ``dp`` is vLLM's data parallelism, the axis that FSDP may shard (``dp_shard``).

    Raises:
        BridgeError: A size below 1, more than `MOST_RANKS` ranks, or an ``ep`` that does not divide ``dp * tp``.
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

    @classmethod
    def of(cls, options: Any) -> Sizes:
        """From whatever has the `DEGREES` as attributes: a command, a table of a TOML file."""
        return cls(**{name: getattr(options, name) for name in DEGREES})

    @property
    def degrees(self) -> dict[str, int]:
        """The `DEGREES` by name."""
        return {name: getattr(self, name) for name in DEGREES}

    @property
    def axes(self) -> dict[str, int]:
        """Size of each axis of the dense and the sparse mesh, by name."""
        return {axis: self.axis(axis) for name in (DENSE, SPARSE) for axis in mesh_axes(name)}

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
    """The mesh called ``name`` that ``rank`` belongs to (dense and sparse: that of its pipeline stage).

    Raises:
        BridgeError: An unknown name, or a rank outside the world.
    """
    axes = mesh_axes(name)
    if (width := narrow_width(name)) is not None:
        sizes = sizes.narrowed(width)
    if not 0 <= rank < sizes.world:
        raise BridgeError(
            f"rank {rank} is outside the world of {sizes.world}; allowed: 0 to {sizes.world - 1}"
        )
    stage = sizes.world // sizes.pp
    first = rank - rank % stage
    shape = tuple(sizes.axis(axis) for axis in axes)
    if len(axes) > 1:
        flat = range(first, first + stage)
    else:
        # The line of ranks through `rank` along the axis: neighbours are a step apart.
        step = {"tp": 1, "ep": 1, "dp": sizes.tp, "pp": stage}[name]
        count = sizes.axis(name)
        start = rank - (rank // step % count) * step
        flat = range(start, start + step * count, step)
    return NamedMesh(name=name, axes=axes, shape=shape, ranks=_nest(tuple(flat), shape))


def describe_all(sizes: Sizes, *, rank: int = 0) -> dict[str, NamedMesh]:
    """Every named mesh of ``rank``."""
    return {name: describe(name, sizes, rank=rank) for name in sizes.meshes}


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


def to_parallel_dims(
    sizes: Sizes, spmd_backend: Literal["partial_dtensor", "full_dtensor", "spmd_types"] = "spmd_types"
) -> ParallelDims:
    """TorchTitan's ``ParallelDims`` for the same ranks; building its meshes needs a process group.

    The groups that hold the same part of a module (``tp_replicate``) are a part of its data parallelism: TorchTitan's
    ``parallelize`` shards nothing over that.
    """
    # Imported here because describing meshes must not cost the import of TorchTitan.
    from torchtitan.distributed import ParallelDims  # noqa: PLC0415

    from titan_bridge.device import use_cpu_if_no_accelerator  # noqa: PLC0415

    use_cpu_if_no_accelerator()
    return ParallelDims(
        dp_replicate=sizes.dp_replicate,
        dp_shard=sizes.dp * sizes.tp_replicate,
        cp=1,
        tp=sizes.tp,
        pp=sizes.pp,
        ep=sizes.ep,
        world_size=sizes.world,
        spmd_backend=spmd_backend,
    )


def sizes_of(parallel_config: Any, world: int, *, ep: int | None = None) -> Sizes:
    """The sizes in a vLLM ``ParallelConfig`` (read by attribute), or the given `Sizes` themselves.

    Args:
        world: Ranks in the default process group. vLLM runs data parallelism of a dense model as engines that
            do not know of each other; their world is tp ranks, and dp is 1 here.
        ep: Ranks that share the experts, if not all (``enable_expert_parallel``) or 1.

    Raises:
        BridgeError: Sizes that are not those of ``world``, pipeline stages together with data parallelism
            (vLLM numbers those ranks in another order), or context parallelism.
    """
    if isinstance(parallel_config, Sizes):
        sizes = parallel_config
    else:
        tp, pp = parallel_config.tensor_parallel_size, parallel_config.pipeline_parallel_size
        context = getattr(parallel_config, "prefill_context_parallel_size", 1)
        if context > 1:
            raise BridgeError(f"prefill_context_parallel_size={context} has no mesh axis; allowed: 1")
        dp = 1 if world == tp * pp else parallel_config.data_parallel_size
        if dp > 1 and pp > 1:
            raise BridgeError(
                f"meshes of data_parallel_size={dp} with pipeline_parallel_size={pp}; set one to 1"
            )
        sizes = Sizes(dp=dp, tp=tp, pp=pp)
        if parallel_config.enable_expert_parallel or ep:
            sizes = replace(sizes, ep=ep or sizes.most_ep)
    if sizes.world != world:
        raise BridgeError(
            f"{sizes} is {sizes.world} ranks, but the process group has {world}; give its sizes"
        )
    return sizes


def get_device_meshes(
    parallel_config: Any, *, ep: int | None = None, device_type: str | None = None
) -> dict[str, DeviceMesh]:
    """The named meshes of this rank as torch's own: those of `Sizes.meshes` and no others, axes of size 1 included.

    Needs an initialised default process group. The first call makes process groups, so every rank of the
    world makes it, with the same arguments; later calls return the same meshes. Meshes share the groups of
    the axes that they have in common ("tp" is the tp axis of "dense").

    Args:
        parallel_config: vLLM's ``ParallelConfig`` or `Sizes`; see `sizes_of`.
        ep: See `sizes_of`.
        device_type: For example "cpu"; else the accelerator's, else "cpu".

    Raises:
        BridgeError: No process group, or sizes that are not the world's.
    """
    # Imported here because describing meshes must not cost the import of torch.
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    if not dist.is_available() or not dist.is_initialized():
        raise BridgeError("there is no process group; call torch.distributed.init_process_group first")
    sizes = sizes_of(parallel_config, dist.get_world_size(), ep=ep)
    if device_type is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device_type = "cpu" if accelerator is None else accelerator.type
    made = _MADE.setdefault(dist.group.WORLD, {})
    if (sizes, device_type) not in made:
        made[sizes, device_type] = _make(sizes, device_type)
    return dict(made[sizes, device_type])


_MADE: WeakKeyDictionary[Any, dict[tuple[Sizes, str], dict[str, DeviceMesh]]] = WeakKeyDictionary()
"""Meshes by default process group: making them twice would make all their process groups twice."""


def _make(sizes: Sizes, device_type: str) -> dict[str, DeviceMesh]:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415  as above

    world = init_device_mesh(device_type, (sizes.world,), mesh_dim_names=("world",))
    roots = {}
    for name in sizes.meshes:
        axes = mesh_axes(name)
        if len(axes) > 1:
            shape = describe(name, sizes).shape
            roots[name] = world._unflatten(0, (sizes.pp, *shape), ("pp", *axes))
    meshes = {name: root[mesh_axes(name)] for name, root in roots.items()}
    meshes["dp"] = roots[DENSE]["dp_replicate", "fsdp"]._flatten("dp")
    meshes |= {"tp": roots[DENSE]["tp"], "ep": roots[SPARSE]["ep"], "pp": roots[DENSE]["pp"]}
    return {name: meshes[name] for name in sizes.meshes}


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
