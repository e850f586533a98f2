"""Which GPU each offline dp rank takes, by vLLM's own config: no two ranks the same one."""

from __future__ import annotations

import pytest

from titan_bridge import cpu
from titan_bridge.engine.run.ranks import VISIBLE, devices, rank_environment
from titan_bridge.errors import BridgeError


@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_in_lockstep_tell_vllm_their_place_on_the_machine(dp, tp):
    from vllm.config import ParallelConfig

    taken = []
    for rank in range(dp):
        with cpu.variables(rank_environment({}, rank, dp, tp, 1234, lockstep=True)):
            config = ParallelConfig(tensor_parallel_size=tp, distributed_executor_backend="mp")
        assert (config.data_parallel_size, config.data_parallel_rank) == (dp, rank)
        # What vLLM's GPU worker computes its device's index from (`Worker.init_device`).
        taken += [config.data_parallel_rank_local * tp + local for local in range(config.local_world_size)]
    assert taken == list(range(dp * tp))


def test_ranks_that_know_of_no_other_see_only_their_own_devices():
    assert [devices({}, rank, 2, 2) for rank in (0, 1)] == [["0", "1"], ["2", "3"]]
    visible = {VISIBLE: "7,5,GPU-a,1"}
    assert [devices(visible, rank, 2, 2) for rank in (0, 1)] == [["7", "5"], ["GPU-a", "1"]]
    with pytest.raises(BridgeError, match=r"CUDA_VISIBLE_DEVICES=7 names 1 GPUs; dp=2 with pp\*tp=1 needs 2"):
        devices({VISIBLE: "7"}, 0, 2, 1)
