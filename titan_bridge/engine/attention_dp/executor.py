"""vLLM's executor of several processes, with the answers of every group's first worker."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from vllm import envs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import ModelRunnerOutput

from titan_bridge.engine.attention_dp.step import GroupOutputs, StepOutput
from titan_bridge.engine.options import titan_options


class GroupExecutor(MultiprocExecutor):
    """Sends a step to all workers; takes one answer for each group, where vLLM takes one worker's."""

    @functools.cached_property
    def _groups(self) -> int:
        return int(titan_options(self.vllm_config.additional_config).attention_dp)

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """The groups' outputs where no group has work, else None: what is left comes with `sample_tokens`."""
        assert isinstance(scheduler_output, StepOutput)
        return self._ask("execute_model", scheduler_output.step, non_block)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """The groups' outputs; `grammar_output` is a tuple by group, or None."""
        return self._ask("sample_tokens", grammar_output, non_block)

    def _ask(self, method: str, argument: Any, non_block: bool) -> Any:
        return self.collective_rpc(
            method,
            args=(argument,),
            non_block=non_block,
            timeout=envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
            kv_output_aggregator=self,  # type: ignore[arg-type]  # vLLM's hook for answers of all workers
        )

    def aggregate(self, outputs: Sequence[ModelRunnerOutput | None], output_rank: int = 0) -> Any:
        """Called by `collective_rpc` with the answers of all workers; those of other workers than a group's first
        are None."""
        found = outputs[:: len(outputs) // self._groups]
        if any(output is None for output in found):
            return None
        make: Any = GroupOutputs  # a type checker that does not see vLLM takes it for a class of one field
        return make(req_ids=[], req_id_to_index={}, groups=tuple(found))
