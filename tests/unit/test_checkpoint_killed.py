"""Killed with SIGKILL at any moment, a hundred times: the target is one complete checkpoint, the old or the new one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.unit.checkpoint_samples import contents, options
from titan_bridge.checkpoint.reshard import prepare
from titan_bridge.testing import make_checkpoint

KILLS = 100
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}


def converted(source: Path, target: Path, *, resume: bool = False) -> int:
    """Convert in a process of its own; returns its id."""
    if child := os.fork():
        return child
    try:
        prepare(options(source, target, overwrite=True, resume=resume, max_shard_size=20_000)).run()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.timeout(300)
def test_a_hundred_kills_leave_the_old_or_the_new_checkpoint(tmp_path):
    sources = [
        make_checkpoint(tmp_path / str(seed), "llama3", tokenizer=False, seed=seed, **TINY) for seed in (1, 2)
    ]
    complete = []
    for source in sources:
        prepare(options(source, tmp_path / f"dcp{source.name}")).run()
        complete.append(contents(tmp_path / f"dcp{source.name}"))
    target = tmp_path / "home" / "out"
    began = time.perf_counter()
    os.waitpid(converted(sources[0], target), 0)
    seconds = time.perf_counter() - began

    def found() -> int:
        """Which of the two is in the target, whole."""
        state = contents(target)
        same = [
            state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in whole)
            for whole in complete
        ]
        assert sum(same) == 1, "a mixture"
        return same.index(True)

    generator, outcomes, old = random.Random(0), Counter(), found()
    for number in range(KILLS):
        child = converted(sources[1 - old], target, resume=number % 3 == 0)
        time.sleep(generator.uniform(0, 1.2 * seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        new = found()
        outcomes["replaced" if new != old else "kept", "killed" if os.WIFSIGNALED(status) else "ended"] += 1
        old = new
    print(dict(outcomes))
    # How many of each depends on what else the machine does; both have to have been seen.
    assert outcomes["kept", "killed"] > 0
    assert sum(count for (what, _), count in outcomes.items() if what == "replaced") > 0
    os.waitpid(converted(sources[1 - old], target), 0)
    assert found() == 1 - old
    assert [path.name for path in target.parent.iterdir()] == ["out"]
