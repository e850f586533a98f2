"""vLLM's scheduler, once for each group, behind vLLM's interface of one.

Nothing of the schedulers is changed: each has the whole configuration, hence limits such as `max_num_seqs` and
`max_num_batched_tokens` for itself, a block pool of its own, and never hears of another group's requests.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from vllm import envs
from vllm.v1.core.sched.interface import PauseState, SchedulerInterface
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import MLAAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from titan_bridge.engine.attention_dp.routing import best_group
from titan_bridge.engine.attention_dp.step import GroupOutputs, StepOutput, joined
from titan_bridge.engine.log import logger_of
from titan_bridge.engine.options import titan_options

logger = logger_of(__name__)


class GroupScheduler(SchedulerInterface):
    """One scheduler for all groups; arguments as those of vLLM's, which make each of them."""

    connector = ec_connector = None  # vLLM's engine core reads both

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        count = int(titan_options(vllm_config.additional_config).attention_dp)
        self.groups = tuple(Scheduler(vllm_config, kv_cache_config, *args, **kwargs) for _ in range(count))
        # The form of a cache, which is the same in all groups; vLLM's engine core asks for nothing else of these two.
        self.kv_cache_config, self.kv_cache_manager = kv_cache_config, self.groups[0].kv_cache_manager
        self._cached: WeakKeyDictionary[Request, int] = WeakKeyDictionary()
        self._log_at = 0.0
        cache, tp = vllm_config.cache_config, vllm_config.parallel_config.tensor_parallel_size
        if (tokens := cache.kv_cache_size_tokens) and count > 1:
            cache.kv_cache_size_tokens *= count
            cache.kv_cache_max_concurrency *= count
            logger.info(
                "Attention data parallelism: %d groups of %d ranks with %s cache tokens each, %s in all; without it "
                "the same bytes hold %s",
                count,
                tp // count,
                f"{tokens:,}",
                f"{tokens * count:,}",
                f"{int(tokens * bytes_saved(kv_cache_config, tp, count)):,}",
            )

    def add_request(self, request: Request) -> None:
        """Give a request to a group; what is added to one that is there goes to its group."""
        owner = next((group for group in self.groups if request.request_id in group.requests), None)
        if owner is None:
            owner = self.groups[best_group(request, self.groups, self._cached)]
        owner.add_request(request)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """End requests, wherever they are; a group passes over those that it does not have."""
        if request_ids is not None:
            request_ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        return [
            request
            for group in self.groups
            for request in group.finish_requests(request_ids, finished_status)
        ]

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step of every group; a group without work has an output without tokens."""
        outputs = [group.schedule(throttle_prefills) for group in self.groups]
        asks = any(
            _asks_for_prompt(group.requests[name], count)
            for group, output in zip(self.groups, outputs, strict=True)
            for name, count in output.num_scheduled_tokens.items()
        )
        return joined(outputs, prompt_logprobs=asks)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> Any:
        """A tuple with each group's `GrammarOutput`, or None where no group has one."""
        # vLLM's are views of one buffer, which the next group's overwrites.
        masks = [
            found and dataclasses.replace(found, grammar_bitmask=found.grammar_bitmask.copy())
            for found in (group.get_grammar_bitmask(output) for group, output in self._each(scheduler_output))
        ]
        return tuple(masks) if any(masks) else None

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Each group takes its own answer; what goes to one client is put together, in the order of the groups."""
        assert isinstance(model_runner_output, GroupOutputs)
        answers = model_runner_output.groups
        merged: dict[int, EngineCoreOutputs] = {}
        stats = []
        for (group, output), answer in zip(self._each(scheduler_output), answers, strict=True):
            for client, found in group.update_from_output(output, answer).items():
                if found.scheduler_stats is not None:
                    stats.append(found.scheduler_stats)
                    found.scheduler_stats = None
                if client not in merged:
                    merged[client] = found
                    continue
                merged[client].outputs = [*merged[client].outputs, *found.outputs]
                if found.finished_requests:
                    merged[client].finished_requests = {
                        *(merged[client].finished_requests or ()), *found.finished_requests,
                    }  # fmt: skip
        if stats:
            self._log(stats)
            next(iter(merged.values())).scheduler_stats = _sum_of(stats)
        return merged

    def _each(self, scheduler_output: SchedulerOutput) -> Iterable[tuple[Scheduler, SchedulerOutput]]:
        assert isinstance(scheduler_output, StepOutput)
        assert scheduler_output.step is not None
        return zip(self.groups, scheduler_output.step.groups, strict=True)

    def make_stats(self) -> SchedulerStats | None:
        """Those of all groups together; see `_sum_of`."""
        stats = [found for group in self.groups if (found := group.make_stats()) is not None]
        return _sum_of(stats) if stats else None

    def _log(self, stats: list[SchedulerStats]) -> None:
        """Say now and then what each group has; vLLM's own line has the sum."""
        now = time.monotonic()
        if now < self._log_at or len(stats) == 1:
            return
        self._log_at = now + envs.VLLM_LOG_STATS_INTERVAL
        logger.info(
            "Attention groups, running + waiting requests and cache in use: %s",
            ", ".join(
                f"{each.num_running_reqs} + {each.num_waiting_reqs} {each.kv_cache_usage:.1%}"
                for each in stats
            ),
        )

    def get_num_unfinished_requests(self) -> int:
        return sum(group.get_num_unfinished_requests() for group in self.groups)

    def has_finished_requests(self) -> bool:
        return any(group.has_finished_requests() for group in self.groups)

    @property
    def pause_state(self) -> PauseState:
        return self.groups[0].pause_state

    def set_pause_state(self, pause_state: PauseState) -> None:
        for group in self.groups:
            group.set_pause_state(pause_state)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Reset every group's; whether all of them could."""
        reset = [group.reset_prefix_cache(reset_running_requests, reset_connector) for group in self.groups]
        return all(reset)

    def reset_encoder_cache(self) -> None:
        for group in self.groups:
            group.reset_encoder_cache()

    def get_request_counts(self) -> tuple[int, int]:
        running, waiting = zip(*(group.get_request_counts() for group in self.groups), strict=True)
        return sum(running), sum(waiting)

    def get_kv_cache_usage(self) -> float:
        return sum(group.get_kv_cache_usage() for group in self.groups) / len(self.groups)

    def shutdown(self) -> None:
        for group in self.groups:
            group.shutdown()

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        raise NotImplementedError("speculation is refused before an engine with attention groups starts")

    def update_draft_token_ids_in_output(
        self, draft_token_ids: Any, scheduler_output: SchedulerOutput
    ) -> None:
        raise NotImplementedError("speculation is refused before an engine with attention groups starts")


def bytes_saved(kv_cache_config: Any, tp: int, groups: int) -> float:
    """Bytes that a rank caches of a token, over those that it would without groups; 1 where tp holds copies anyway."""
    held = plain = 0
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        several = isinstance(spec, UniformTypeKVCacheSpecs)
        for layer in spec.kv_cache_specs.values() if several else [spec] * len(group.layer_names):
            heads = 1 if isinstance(layer, MLAAttentionSpec) else layer.num_kv_heads * tp // groups
            held += layer.num_kv_heads
            plain += heads // math.gcd(heads, tp)
    return held / plain


def _asks_for_prompt(request: Request, scheduled: int) -> bool:
    """Whether `scheduled` tokens of a request are of a prompt whose log-probabilities are asked for."""
    asked = request.sampling_params
    return (
        asked is not None
        and (asked.prompt_logprobs is not None or asked.prompt_logprob_token_ids is not None)
        and request.num_computed_tokens - scheduled < request.num_prompt_tokens
    )


def _sum_of(stats: list[SchedulerStats]) -> SchedulerStats:
    """One record of all groups: counts and hits are added, cache usage is the mean of pools of one size."""
    first = stats[0]
    prefix = PrefixCacheStats()
    for each in stats:
        for field in (
            "requests",
            "queries",
            "hits",
            "preempted_requests",
            "preempted_queries",
            "preempted_hits",
        ):
            setattr(prefix, field, getattr(prefix, field) + getattr(each.prefix_cache_stats, field))
        prefix.reset |= each.prefix_cache_stats.reset
    return dataclasses.replace(
        first,
        **{
            field: sum(getattr(each, field) for each in stats)
            for field in ("num_running_reqs", "num_waiting_reqs", "num_skipped_waiting_reqs")
        },
        kv_cache_usage=sum(each.kv_cache_usage for each in stats) / len(stats),
        prefix_cache_stats=prefix,
        kv_cache_eviction_events=[event for each in stats for event in each.kv_cache_eviction_events],
    )
