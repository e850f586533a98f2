"""vLLM's worker, running its own group's part of a step; a worker whose group has no work joins the collectives."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from titan_bridge.engine.attention_dp.step import Step

_WORKERS = {"cpu": "vllm.v1.worker.cpu_worker.CPUWorker", "cuda": "vllm.v1.worker.gpu_worker.Worker"}
_Base: Any = resolve_obj_by_qualname(_WORKERS[current_platform.device_type])


class GroupWorker(_Base):
    """The platform's worker of one rank."""

    _step: Step | None = None
    _idle: Any = None
    """The output of a step in which this worker's group has no work."""

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the own group's part of a `Step`; None, and the rest in `sample_tokens`, where any group has work.

        What is no `Step` comes from vLLM's warm-up, the same to all ranks.
        """
        if not isinstance(scheduler_output, Step):
            return super().execute_model(scheduler_output)
        step = scheduler_output
        rows = self.get_model().rows
        own = step.groups[rows.group]
        if not any(step.tokens):
            return super().execute_model(own)
        self._step = step
        rows.begin(step.tokens, [len(group.num_scheduled_tokens) for group in step.groups])
        if own.total_num_scheduled_tokens:
            self._idle = None
            return super().execute_model(own)
        self._idle = super().execute_model(own)  # requests end in a step without tokens, too
        self.execute_dummy_batch()
        if not self.use_v2_model_runner:  # where vLLM's first runner calls the head
            self._join_head()
        return None

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """The own group's output; None on workers that are not their group's first."""
        rows, step = self.get_model().rows, self._step
        if step is None:
            return super().sample_tokens(grammar_output)
        if self._idle is None:
            output = super().sample_tokens(grammar_output and grammar_output[rows.group])
        else:
            output = self._idle
            if self.use_v2_model_runner:
                self._join_head()
        if step.prompt_logprobs:
            while rows.others_ask():
                self._join_head()
        rows.end()
        self._step = None
        return output if rows.speaks else None

    @torch.inference_mode()
    def _join_head(self) -> None:
        """Take part in a call of the head that other groups make."""
        model = self.get_model()
        weight = model.model.norm.weight
        model.compute_logits(weight.new_empty(0, weight.shape[0]))
