"""Parallel sizes and the named meshes that they make, for any number of ranks and without a process group.

One vocabulary for both sides. vLLM's (dp, tp, expert parallel or not) and TorchTitan's ``ParallelDims``
describe the same ranks: ``rank = ((pp_rank * dp_replicate + replica) * dp + dp_rank) * tp + tp_rank``. The
dense mesh unflattens them as (dp_replicate, fsdp, tp), the sparse mesh as (dp_replicate, efsdp, ep), so that
the ep axis runs over consecutive ranks, first through tp and then through dp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from titan_bridge.errors import BridgeError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torchtitan.distributed import ParallelDims
    from torchtitan.models.common.decoder import Decoder

DENSE, SPARSE = "dense", "sparse"

MESH_AXES: dict[str, tuple[str, ...]] = {
    DENSE: ("dp_replicate", "fsdp", "tp"),
    SPARSE: ("dp_replicate", "efsdp", "ep"),
    "dp": ("dp",),
    "tp": ("tp",),
    "ep": ("ep",),
    "pp": ("pp",),
}
"""Every mesh name and its axes; the only place that lists them."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parallel degrees. ``dp`` is vLLM's data parallelism, the axis that FSDP may shard (``dp_shard``).

    Raises:
        BridgeError: A size below 1, or an ``ep`` that does not divide ``dp * tp``.
    """

    dp: int = 1
    tp: int = 1
    ep: int = 1
    dp_replicate: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "ep", "dp_replicate", "pp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BridgeError(f"{name}={value!r} is not a size; give an integer of at least 1")
        if (self.dp * self.tp) % self.ep:
            raise BridgeError(
                f"ep={self.ep} does not divide dp*tp={self.dp * self.tp}; "
                f"allowed with dp={self.dp}, tp={self.tp}: {_listed(divisors(self.dp * self.tp))}"
            )

    @property
    def fsdp(self) -> int:
        return self.dp

    @property
    def efsdp(self) -> int:
        """Ranks that hold the same experts, over which FSDP may shard them further."""
        return self.dp * self.tp // self.ep

    @property
    def world(self) -> int:
        return self.pp * self.dp_replicate * self.dp * self.tp

    def axis(self, name: str) -> int:
        """Size of a mesh axis. Raises BridgeError for a name that no mesh has."""
        if name == "dp":
            # The 1-D mesh runs over replicas, too.
            return self.dp_replicate * self.dp
        if name not in {axis for axes in MESH_AXES.values() for axis in axes}:
            axes = sorted({axis for axes in MESH_AXES.values() for axis in axes})
            raise BridgeError(f"there is no mesh axis {name!r}; allowed: {_listed(axes)}")
        return getattr(self, name)


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
    if name not in MESH_AXES:
        raise BridgeError(f"there is no mesh {name!r}; allowed: {_listed(MESH_AXES)}")
    if not 0 <= rank < sizes.world:
        raise BridgeError(
            f"rank {rank} is outside the world of {sizes.world}; allowed: 0 to {sizes.world - 1}"
        )
    stage = sizes.world // sizes.pp
    first = rank - rank % stage
    axes = MESH_AXES[name]
    shape = tuple(sizes.axis(axis) for axis in axes)
    if name in (DENSE, SPARSE):
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
    return {name: describe(name, sizes, rank=rank) for name in MESH_AXES}


@dataclass(frozen=True, kw_only=True)
class ShardPlacement:
    """Which mesh a parameter belongs to, and which of its dims that mesh's fsdp or efsdp axis shards."""

    mesh: Literal["dense", "sparse"]
    dim: int = 0


def padded_vocab(vocab: int, sizes: Sizes) -> int:
    """Rows that an embedding or head of ``vocab`` rows needs so that tp divides them."""
    return math.ceil(vocab / sizes.tp) * sizes.tp


def check_divides(config: Decoder.Config, sizes: Sizes) -> None:
    """Check heads, kv heads, hidden sizes and experts of a TorchTitan config tree against the sizes.

    The vocabulary is not checked: see ``padded_vocab``.

    Raises:
        BridgeError: One line with every size that does not divide, and what is allowed instead.
    """
    by_tp: dict[str, int] = {}
    experts: set[int] = set()
    for layer in config.layers:
        attention = layer.attention
        by_tp[f"n_heads={attention.n_heads}"] = attention.n_heads
        kv_heads = attention.n_kv_heads or attention.n_heads
        by_tp[f"n_kv_heads={kv_heads}"] = kv_heads
        feed_forward = layer.feed_forward
        if layer.moe is not None:
            experts.add(layer.moe.num_experts)
            feed_forward = layer.moe.shared_experts
            if sizes.ep == 1:
                hidden = layer.moe.routed_experts.inner_experts.hidden_dim
                by_tp[f"moe_intermediate_size={hidden}"] = hidden
        if feed_forward is not None:
            hidden = feed_forward.w1.out_features
            by_tp[f"intermediate_size={hidden}"] = hidden
    problems = []
    bad = [name for name, size in by_tp.items() if size % sizes.tp]
    if bad:
        allowed = _listed(divisors(math.gcd(*by_tp.values())))
        problems.append(f"tp={sizes.tp} does not divide {', '.join(bad)}; allowed for this model: {allowed}")
    for count in sorted(experts):
        if count % sizes.ep:
            allowed = _listed(n for n in divisors(sizes.dp * sizes.tp) if count % n == 0)
            problems.append(
                f"ep={sizes.ep} does not divide num_experts={count}; "
                f"allowed with dp={sizes.dp}, tp={sizes.tp}: {allowed}"
            )
    if sizes.ep > 1 and not experts:
        problems.append(f"ep={sizes.ep} but the model has no experts; allowed: 1")
    if problems:
        raise BridgeError("; ".join(problems))


def to_parallel_dims(
    sizes: Sizes, spmd_backend: Literal["partial_dtensor", "full_dtensor", "spmd_types"] = "spmd_types"
) -> ParallelDims:
    """TorchTitan's ``ParallelDims`` for the same ranks; building its meshes needs a process group."""
    # Imported here because describing meshes must not cost the import of TorchTitan.
    from torchtitan.distributed import ParallelDims  # noqa: PLC0415

    from titan_bridge.device import use_cpu_if_no_accelerator  # noqa: PLC0415

    use_cpu_if_no_accelerator()
    return ParallelDims(
        dp_replicate=sizes.dp_replicate,
        dp_shard=sizes.dp,
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
        experts = dp * tp if parallel_config.enable_expert_parallel else 1
        sizes = Sizes(dp=dp, tp=tp, ep=ep or experts, pp=pp)
    if sizes.world != world:
        raise BridgeError(
            f"{sizes} is {sizes.world} ranks, but the process group has {world}; give its sizes"
        )
    return sizes


def get_device_meshes(
    parallel_config: Any, *, ep: int | None = None, device_type: str | None = None
) -> dict[str, DeviceMesh]:
    """The named meshes of this rank as torch's own: those of `MESH_AXES` and no others, axes of size 1 included.

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
    roots = {
        name: world._unflatten(
            0, (sizes.pp, *(sizes.axis(axis) for axis in MESH_AXES[name])), ("pp", *MESH_AXES[name])
        )
        for name in (DENSE, SPARSE)
    }
    meshes = {name: root[MESH_AXES[name]] for name, root in roots.items()}
    meshes["dp"] = roots[DENSE]["dp_replicate", "fsdp"]._flatten("dp")
    meshes |= {"tp": roots[DENSE]["tp"], "ep": roots[SPARSE]["ep"], "pp": roots[DENSE]["pp"]}
    return {name: meshes[name] for name in MESH_AXES}


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
