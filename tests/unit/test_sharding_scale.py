"""A model of 1 T parameters is planned in seconds, and looked at in less."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from tests.unit.sharding_samples import whole
from titan_bridge.sharding import View
from titan_bridge.sharding.layout import torch_dtype
from titan_bridge.sharding.plan import plan
from titan_bridge.sharding.show import layout_table, load_of

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_plan.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_plan", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_256_trainer_ranks_to_128(bench):
    """HSDP x TP x EP x PP to dp x tp, ep = dp * tp: under 2 s and 1 GB, at the lower bound and even."""
    result = bench.measure(256)
    assert result["parameters"] > 1e12
    assert result["seconds_first"] < 2
    assert result["planner_mb"] < 1000
    assert result["at_lower_bound"]
    assert result["balance"] <= 1.1


def test_cost_does_not_outgrow_the_boxes(bench):
    small, large = bench.measure(64), bench.measure(1024)
    assert large["copies"] > 50 * small["copies"]
    assert large["seconds"] / large["copies"] <= small["seconds"] / small["copies"]
    assert large["balance"] <= 1.01 * large["balance_floor"]


def test_one_rank_reads_its_part_of_70_000_files_tensors(bench):
    """A Hugging Face checkpoint, one tensor an expert, to 128 ranks."""
    _, layout, _ = bench.layouts(256)
    files, views = [], []
    for fqn, param in layout.params.items():
        if "experts.w" not in fqn or "shared" in fqn:
            files.append(whole(fqn, param.shape, torch_dtype(param.dtype), "dense.safetensors"))
            continue
        experts, *matrix = param.shape
        for e in range(experts):
            view = View(
                name=f"{fqn}.{e}",
                fqn=fqn,
                shape=tuple(matrix),
                factors=tuple((size,) for size in param.shape),
                index=((e, e + 1), *((0, size) for size in matrix)),
            )
            views.append(view)
            files.append(whole(view.name, view.shape, torch_dtype(param.dtype), f"{fqn}.safetensors"))
    assert len(files) > 70_000
    start = time.process_time()  # of this process: others may use the machine
    result = plan(files, layout, views)
    assert time.process_time() - start < 20
    own = sum(copy.elements for copy in result.copies(destination=5)) * 2
    assert own == result.received[5] == load_of(layout)[5]


def test_a_layout_of_4096_ranks_is_shown_at_once(bench):
    source, _, _ = bench.layouts(4096)
    start = time.process_time()
    layout_table(source, 4095)
    assert time.process_time() - start < 10
