"""A tensor's fingerprint sees every change, and is the same from every layout."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from titan_bridge import fingerprint as module
from titan_bridge.errors import BridgeError
from titan_bridge.fingerprint import combine, fingerprint, of_box, of_plan, partial, seal
from titan_bridge.sharding.boxes import Box, pieces_of
from titan_bridge.sharding.layout import MeshLayout
from titan_bridge.sharding.moves import Window
from titan_bridge.sharding.plan import plan
from titan_bridge.sharding.tensors import OnMesh, TensorMetadata
from titan_bridge.sharding.view import View

_DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every pattern of bits, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


tensors = st.builds(
    random_bits,
    st.lists(st.integers(1, 9), max_size=4).map(tuple)
    | st.tuples(st.integers(1, 3), st.integers(1000, 9000)),
    st.sampled_from(_DTYPES[:-1]),
    st.integers(0, 2**32),
)


@given(tensors, st.data())
@settings(deadline=None, max_examples=50)
def test_each_flipped_bit_is_seen(tensor: torch.Tensor, data: st.DataObject) -> None:
    changed = tensor.clone()
    flat = changed.reshape(-1).view(torch.uint8)
    at, bit = data.draw(st.integers(0, len(flat) - 1)), data.draw(st.integers(0, 7))
    flat[at] ^= 1 << bit
    assert fingerprint(changed.reshape(tensor.shape)) != fingerprint(tensor)


def test_no_two_flipped_bits_are_alike() -> None:
    """4,096 tensors that differ from zeros in one bit, and from each other in two: in signs above all."""
    zeros = torch.zeros(8, 32, dtype=torch.int16)
    seen = set()
    for at, bit in itertools.product(range(zeros.numel()), range(16)):
        zeros.view(-1)[at] = (1 << bit) - (1 << 16 if bit == 15 else 0)
        seen.add(fingerprint(zeros.view(torch.bfloat16)))
        zeros.view(-1)[at] = 0
    assert len(seen) == 8 * 32 * 16


@given(tensors, st.data())
@settings(deadline=None, max_examples=50)
def test_what_stands_elsewhere_is_seen(tensor: torch.Tensor, data: st.DataObject) -> None:
    """Elements exchanged, and shifts along each dim."""
    tensor = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
    flat = tensor.reshape(-1)
    i, j = (data.draw(st.integers(0, len(flat) - 1)) for _ in range(2))
    swapped = flat.clone()
    swapped[i], swapped[j] = flat[j], flat[i]
    dims = range(tensor.ndim)
    others = [
        swapped.reshape(tensor.shape),
        *(tensor.roll(1, d) for d in dims),
        *(tensor.flip(d) for d in dims),
    ]
    for other in others:
        same = torch.equal(other, tensor)
        assert (fingerprint(other) == fingerprint(tensor)) == same


def test_shape_and_dtype_belong_to_it() -> None:
    """Zeros add nothing to the sum, so what tells these apart is the seal."""
    kinds = [
        torch.zeros(shape, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for shape in ((4, 6), (6, 4), (24,), (1, 24), ())
    ]
    assert len({fingerprint(kind) for kind in kinds}) == len(kinds)
    square = random_bits((32, 32), torch.float32, 1)
    assert fingerprint(square.T) != fingerprint(square) == fingerprint(square.T.contiguous().T)
    assert fingerprint(torch.tensor(0.0)) != fingerprint(torch.tensor(-0.0))


def test_a_cast_comes_first() -> None:
    tensor = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    low = tensor.bfloat16()
    assert fingerprint(tensor, torch.bfloat16) == fingerprint(low)
    assert fingerprint(low.float()) != fingerprint(low) == fingerprint(low.float(), torch.bfloat16)


def test_it_stays_what_it_was() -> None:
    """Two machines compare numbers that two versions of torch or of this package made."""
    tensor = (torch.arange(3 * 5000) % 251).to(torch.bfloat16).reshape(3, 5000)
    assert f"{fingerprint(tensor):016x}" == "6441c322573fe835"


@given(tensors, st.data())
@settings(deadline=None, max_examples=50)
def test_disjoint_boxes_add_up(tensor: torch.Tensor, data: st.DataObject) -> None:
    boxes = [Box.whole(tensor.shape)]
    for _ in range(data.draw(st.integers(0, 6))):
        box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        wide = [d for d in range(box.ndim) if box.shape[d] > 1]
        if not wide:
            boxes.append(box)
            continue
        d = data.draw(st.sampled_from(wide))
        at = data.draw(st.integers(box.start[d] + 1, box.stop[d] - 1))
        boxes.append(Box(start=box.start, stop=(*box.stop[:d], at, *box.stop[d + 1 :])))
        boxes.append(Box(start=(*box.start[:d], at, *box.start[d + 1 :]), stop=box.stop))
    parts = [of_box(tensor[box.slices], box, tensor.shape) for box in boxes]
    assert seal(combine(parts), tensor.shape, tensor.dtype) == fingerprint(tensor)


@given(tensors, st.sampled_from([500, 4096]))
@settings(deadline=None, max_examples=25)
def test_chunks_do_not_matter(tensor: torch.Tensor, most: int) -> None:
    whole = fingerprint(tensor)
    usual = dict(module._CHUNK)
    module._CHUNK.update(cpu=most)
    try:
        assert fingerprint(tensor) == whole
    finally:
        module._CHUNK.update(usual)


_LAYOUTS = {
    "fsdp": ((1, 4, 1), (Replicate(), Shard(0), Replicate())),
    "hsdp": ((2, 2, 1), (Replicate(), Shard(0), Replicate())),
    "tp rows": ((1, 1, 4), (Replicate(), Replicate(), Shard(0))),
    "tp columns": ((1, 1, 4), (Replicate(), Replicate(), Shard(1))),
    "fsdp over tp rows": ((1, 4, 2), (Replicate(), _StridedShard(0, split_factor=2), Shard(0))),
    "fsdp over tp columns": ((1, 2, 2), (Replicate(), Shard(0), Shard(1))),
    "ep": ((1, 2, 4), (Replicate(), Shard(1), Shard(0))),
    "replicas": ((2, 2, 2), (Replicate(), Replicate(), Replicate())),
}


@pytest.mark.parametrize("name", _LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 20), (9, 30), (8, 6, 5), (16, 4100)])
def test_every_layout_has_the_same(name: str, shape: tuple[int, ...]) -> None:
    """Replicas count once; ranks may hold nothing (9 rows on 4)."""
    sizes, placements = _LAYOUTS[name]
    tensor = random_bits(shape, torch.bfloat16, 3)
    mesh = MeshLayout(axes=("a", "b", "c"), shape=sizes, ranks=tuple(range(math.prod(sizes))))
    held = TensorMetadata(
        name="w", shape=shape, dtype=torch.bfloat16, on=OnMesh(mesh=mesh, placements=placements)
    )
    made = plan([held], [TensorMetadata.whole("w", shape, torch.bfloat16, "all")])
    sums = []
    for rank in mesh.ranks:
        pieces = pieces_of(placements, shape, sizes, mesh.coordinate(rank))
        lengths = [max((p.local.stop[d] for p in pieces), default=0) for d in range(len(shape))]
        local = torch.empty(lengths, dtype=torch.bfloat16)
        for piece in pieces:
            local[piece.local.slices] = tensor[piece.box.slices]
        sums.append(of_plan(made, rank, lambda copy, local=local: local).get("w", 0))
    assert seal(combine(sums), shape, torch.bfloat16) == fingerprint(tensor)


def test_views_are_followed() -> None:
    """Rotary halves, one of several fused tensors, and one expert: the number is that of the external tensor."""
    shape = (4 * 3 * 6, 40)
    titan = random_bits(shape, torch.float32, 5)
    views = [
        View(
            name="q",
            fqn="w",
            shape=(4 * 2 * 6, 40),
            factors=((4, 3, 3, 2), (40,)),
            index=((0, 4), (0, 2), (0, 3), (0, 2), (0, 40)),
            permute=(0, 1, 3, 2, 4),
        ),
        View(
            name="turned",
            fqn="w",
            shape=(40, 4 * 6),
            factors=((4, 3, 6), (40,)),
            index=((0, 4), (2, 3), (0, 6), (0, 40)),
            permute=(3, 0, 1, 2),
        ),
        View(
            name="columns",
            fqn="v",
            shape=(72, 40),
            factors=((72,), (8, 5)),
            index=((0, 72), (0, 8), (0, 5)),
            permute=(0, 2, 1),
        ),
    ]
    other = random_bits(shape, torch.float32, 6)
    sources = [
        TensorMetadata.whole("w", shape, torch.float32, 0),
        TensorMetadata.whole("v", shape, torch.float32, 0),
    ]
    made = plan(sources, [TensorMetadata.whole(v.name, v.shape, torch.float32, "all") for v in views], views)
    sums = of_plan(made, 0, lambda copy: {"w": titan, "v": other}[copy.source_name])
    for view in views:
        external = view.read(titan if view.fqn == "w" else other)
        assert seal(sums[view.name], view.shape, torch.float32) == fingerprint(external)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_padding_adds_nothing(rows: int, columns: int, seed: int) -> None:
    """CUDA's product wants other shapes than the CPU's; both are the exact one."""
    data = random_bits((rows, columns), torch.int64, seed).to(torch.int8)
    weights = module._constants(torch.device("cpu"))[0][seed : seed + columns]
    exact = data.long() @ weights.long()
    assert torch.equal(module._product(data, torch.int8, weights).long(), exact)
    assert torch.equal(module._padded_product(data, torch.int8, weights).long(), exact)


def test_the_largest_inner_sum_is_exact() -> None:
    weights, _ = module._constants(torch.device("cpu"))
    for value in (-128, 127):
        data = torch.full((20, len(weights)), value, dtype=torch.int8)
        assert torch.equal(module._product(data, torch.int8, weights).long(), data.long() @ weights.long())
        worst = torch.where(weights < 0, -64, 63).to(torch.int8)
        data = torch.where(worst[:, 0] < 0, -128, 127).to(torch.int8).expand(20, -1).contiguous()
        assert torch.equal(module._product(data, torch.int8, worst).long(), data.long() @ worst.long())


@pytest.mark.parametrize(
    "width", [1000, 2881, 300_000]
)  # blocks in pieces, blocks that end within elements, one row
def test_a_cast_in_pieces_is_the_cast_of_the_whole(width: int) -> None:
    tensor = torch.randn(-(-(1 << 20) // width), width)
    assert fingerprint(tensor, torch.bfloat16) == fingerprint(tensor.bfloat16())


def test_a_window_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BridgeError, match="part of shape"):
        partial(torch.zeros(3), Window(size=(4,), stride=(1,), offset=0), (4,))
    with pytest.raises(BridgeError, match="rows"):
        partial(torch.zeros(2, 2), Window(size=(2, 2), stride=(5, 1), offset=0), (4, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_has_the_same() -> None:
    for shape in ((1, 7), (3, 5000), (300, 1000)):
        tensor = random_bits(shape, torch.bfloat16, 9)
        assert fingerprint(tensor.cuda()) == fingerprint(tensor)
