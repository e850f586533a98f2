"""What travels between engine and workers in a step: the groups' own messages side by side."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of all groups, as every worker gets it."""

    groups: tuple[SchedulerOutput, ...]
    """vLLM's own, by group."""
    prompt_logprobs: bool
    """Whether a request of any group may ask the head for its prompt's log-probabilities."""

    @property
    def tokens(self) -> list[int]:
        """Tokens of each group."""
        return [group.total_num_scheduled_tokens for group in self.groups]


@dataclass
class StepOutput(SchedulerOutput):
    """What vLLM's engine core sees of a step: all groups' requests in one."""

    step: Step | None = None


@dataclass(kw_only=True)
class GroupOutputs(ModelRunnerOutput):
    """What the workers answered, by group; the fields of its base are empty."""

    groups: tuple[ModelRunnerOutput, ...]


def joined(groups: Sequence[SchedulerOutput], *, prompt_logprobs: bool) -> StepOutput:
    """One output with the requests of all groups. Block ids in it mean nothing without their group."""

    def merged(name: str) -> dict:
        return {key: value for group in groups for key, value in getattr(group, name).items()}

    cached = [group.scheduled_cached_reqs for group in groups]
    columns = {
        field.name: functools.reduce(operator.or_, (getattr(each, field.name) for each in cached))
        if field.name in ("resumed_req_ids", "all_token_ids")
        else list(chain.from_iterable(getattr(each, field.name) for each in cached))
        for field in dataclasses.fields(CachedRequestData)
    }
    make: Any = StepOutput  # a type checker that does not see vLLM takes it for a class of one field
    return make(
        scheduled_new_reqs=[new for group in groups for new in group.scheduled_new_reqs],
        scheduled_cached_reqs=CachedRequestData(**columns),
        num_scheduled_tokens=merged("num_scheduled_tokens"),
        total_num_scheduled_tokens=sum(group.total_num_scheduled_tokens for group in groups),
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=set().union(*(group.finished_req_ids for group in groups)),
        free_encoder_mm_hashes=[],
        preempted_req_ids=set().union(*(group.preempted_req_ids or () for group in groups)),
        has_structured_output_requests=any(group.has_structured_output_requests for group in groups),
        pending_structured_output_tokens=any(group.pending_structured_output_tokens for group in groups),
        step=Step(groups=tuple(groups), prompt_logprobs=prompt_logprobs),
    )
