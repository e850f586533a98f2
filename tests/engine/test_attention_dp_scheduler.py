"""Schedulers of attention groups without an engine: vLLM's own ones, random arrivals, tokens made by arithmetic."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from titan_bridge.engine.attention_dp.routing import CLOSE, cached_prefix
from titan_bridge.engine.attention_dp.scheduler import GroupScheduler, bytes_saved
from titan_bridge.engine.attention_dp.step import GroupOutputs, StepOutput
from titan_bridge.testing import make_checkpoint

pytestmark = pytest.mark.engine

BLOCK = 4
HASH = get_hash_fn_by_name("sha256")


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    model = make_checkpoint(tmp_path_factory.mktemp("model"), "llama3", max_position_embeddings=256)
    init_none_hash(HASH)
    return EngineArgs(
        model=str(model), block_size=BLOCK, max_model_len=128, max_num_seqs=8, max_num_batched_tokens=128,
        enable_prefix_caching=True,
    ).create_engine_config()  # fmt: skip


def cache_of(blocks: int) -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    return KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )


def make(
    config: VllmConfig, groups: int | None, *, blocks: int = 40, tokens: int = 32, policy: str = "fcfs"
) -> Any:
    """vLLM's scheduler (groups is None) or ours."""
    config = copy.copy(config)
    config.additional_config = {"titan": {"attention_dp": groups or 1}}
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.max_num_batched_tokens = config.scheduler_config.max_num_scheduled_tokens = tokens
    config.scheduler_config.policy = policy
    config.cache_config.num_gpu_blocks = blocks
    return (Scheduler if groups is None else GroupScheduler)(
        config, cache_of(blocks), StructuredOutputManager(config), block_size=BLOCK, hash_block_size=BLOCK,
        log_stats=True,
    )  # fmt: skip


def request(name: str, prompt: list[int], answer: int = 8, **options: Any) -> Request:
    sampling = SamplingParams(max_tokens=answer, ignore_eos=True, **options.pop("sampling", {}))
    hasher = get_request_block_hasher(BLOCK, HASH)
    return Request(name, prompt, sampling, None, block_hasher=hasher, **options)


def answer_to(output: SchedulerOutput, requests: dict[str, Request]) -> ModelRunnerOutput:
    """What a worker would answer: the next token of each request is made of its name and length."""
    names = list(output.num_scheduled_tokens)
    tokens = []
    for name in names:
        known = requests[name]
        done = known.num_computed_tokens >= known.num_tokens
        tokens.append([(sum(map(ord, name)) + known.num_tokens) % 50] if done else [])
    return ModelRunnerOutput(
        req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}, sampled_token_ids=tokens
    )


def answers(scheduler: Any, output: SchedulerOutput) -> ModelRunnerOutput:
    if isinstance(scheduler, Scheduler):
        return answer_to(output, scheduler.requests)
    assert isinstance(output, StepOutput)
    assert output.step is not None
    found = [
        answer_to(each, group.requests)
        for group, each in zip(scheduler.groups, output.step.groups, strict=True)
    ]
    return GroupOutputs(req_ids=[], req_id_to_index={}, groups=tuple(found))


def step(scheduler: Any, between: Any = None) -> tuple[SchedulerOutput, dict[str, Any]]:
    """One step; returns what was scheduled, and each request's output. `between` runs before the answer is taken."""
    output = scheduler.schedule()
    answered = answers(scheduler, output)
    if between:
        between()
    found = scheduler.update_from_output(output, answered)
    return output, {each.request_id: each for client in found.values() for each in client.outputs}


def by_group(output: SchedulerOutput) -> tuple[SchedulerOutput, ...]:
    assert isinstance(output, StepOutput)
    assert output.step is not None
    return output.step.groups


def group_of(scheduler: GroupScheduler, name: str) -> int:
    (at,) = [at for at, group in enumerate(scheduler.groups) if name in group.requests]
    return at


def plain(output: SchedulerOutput) -> dict[str, Any]:
    facts = dict(vars(output))
    facts.pop("step", None)
    facts["scheduled_new_reqs"] = [
        (new.req_id, new.prompt_token_ids, new.block_ids, new.num_computed_tokens)
        for new in output.scheduled_new_reqs
    ]
    facts["scheduled_cached_reqs"] = vars(output.scheduled_cached_reqs)
    return {
        name: facts[name]
        for name in (
            "scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens",
            "finished_req_ids", "free_encoder_mm_hashes", "has_structured_output_requests",
        )
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arrival:
    at: int
    prompt: list[int]
    answer: int
    abort: int | None
    """Steps after its arrival, or None; odd: between schedule and output."""
    priority: int


def arrivals(seed: int, count: int) -> list[Arrival]:
    """A quarter aborted, half with one of three prefixes, in bursts."""
    chance = random.Random(seed)
    prefixes = [[chance.randrange(50) for _ in range(chance.randrange(4, 40))] for _ in range(3)]
    at, found = 0, []
    for _ in range(count):
        at += chance.choice([0, 0, 0, 1, 1, 9])
        prompt = [chance.randrange(50) for _ in range(chance.randrange(1, 50))]
        if chance.random() < 0.5:
            prompt = chance.choice(prefixes) + prompt
        abort = chance.randrange(0, 12) if chance.random() < 0.25 else None
        found.append(Arrival(at, prompt, chance.randrange(1, 30), abort, chance.randrange(3)))
    return found


@dataclasses.dataclass
class Run:
    """What became of a list of arrivals."""

    ended: dict[str, int] = dataclasses.field(default_factory=dict)
    """How often each request ended."""
    tokens: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    outputs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    waits: list[int] = dataclasses.field(default_factory=list)
    """Steps from arrival to the first token scheduled."""
    preempted: int = 0
    cached: int = 0
    idle_steps: int = 0


def run(scheduler: Any, trace: list[Arrival]) -> Run:
    done, now = Run(), 0
    waiting: dict[str, int] = {}
    pending = [(f"r{i}", arrival) for i, arrival in enumerate(trace)]
    aborts: dict[int, list[str]] = {}

    def abort(step: int) -> None:
        for name in aborts.pop(step, []):
            for each in scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED):
                done.ended[each.request_id] = done.ended.get(each.request_id, 0) + 1
                waiting.pop(each.request_id, None)

    while pending or scheduler.has_requests() or aborts:
        assert now < 5000, "it does not come to an end"
        while pending and pending[0][1].at <= now:
            name, arrival = pending.pop(0)
            scheduler.add_request(
                request(
                    name, arrival.prompt, arrival.answer, priority=arrival.priority, arrival_time=float(now)
                )
            )
            waiting[name] = now
            done.tokens[name] = []
            if arrival.abort is not None:
                aborts.setdefault(2 * (now + arrival.abort // 2) + arrival.abort % 2, []).append(name)
        abort(2 * now)
        output, found = step(scheduler, lambda now=now: abort(2 * now + 1))
        for name in output.num_scheduled_tokens:
            if name in waiting:
                done.waits.append(now - waiting.pop(name))
        if isinstance(scheduler, GroupScheduler):
            _check_groups(scheduler, output, waiting)
            done.idle_steps += output.total_num_scheduled_tokens > 0 and not all(output.step.tokens)
        done.preempted += len(output.preempted_req_ids or ())
        done.cached += sum(new.num_computed_tokens for new in output.scheduled_new_reqs)
        done.outputs.append(plain(output))
        for name, each in found.items():
            done.tokens[name] += each.new_token_ids
            if each.finish_reason is not None:
                done.ended[name] = done.ended.get(name, 0) + 1
        now += 1
    return done


def _check_groups(scheduler: GroupScheduler, output: SchedulerOutput, waiting: dict[str, int]) -> None:
    """A step names each request in its own group alone, with blocks of its own, and no group idles over its queue."""
    seen: set[str] = set()
    for group, own in zip(scheduler.groups, by_group(output), strict=True):
        names = set(own.num_scheduled_tokens)
        assert not names & seen
        seen |= names
        for new in own.scheduled_new_reqs:
            if new.req_id in group.requests:
                (held,) = group.kv_cache_manager.get_block_ids(new.req_id)
                assert set(new.block_ids[0]) <= set(held)
        if any(name in group.requests for name in waiting):
            working = own.total_num_scheduled_tokens or own.preempted_req_ids
            assert working, "a request waits, and its group does nothing"
    assert seen == set(output.num_scheduled_tokens)


def free(scheduler: Any) -> list[int]:
    groups = [scheduler] if isinstance(scheduler, Scheduler) else scheduler.groups
    return [group.kv_cache_manager.block_pool.get_num_free_blocks() for group in groups]


@pytest.mark.parametrize("seed", range(24))
def test_every_request_ends_once_and_all_blocks_are_free(vllm_config: VllmConfig, seed: int) -> None:
    groups, policy = 1 + seed % 8, ("fcfs", "priority")[seed // 8 % 2]
    trace = arrivals(seed, 100)
    ours = make(vllm_config, groups, blocks=40, policy=policy)
    before = free(ours)
    done = run(ours, trace)
    assert done.ended == {f"r{i}": 1 for i in range(len(trace))}
    assert free(ours) == before
    assert not any(group.requests for group in ours.groups)
    stock = run(make(vllm_config, None, blocks=40, policy=policy), trace)
    whole = [f"r{i}" for i, arrival in enumerate(trace) if arrival.abort is None]
    assert {name: done.tokens[name] for name in whole} == {name: stock.tokens[name] for name in whole}
    print(
        f"groups {groups} {policy}: largest wait {max(done.waits)} steps (one scheduler: {max(stock.waits)}), "
        f"{done.preempted} preemptions, {done.cached} cached tokens, {done.idle_steps} steps with an idle group"
    )
    # `run` has seen that a request waits only while its group works.
    assert max(done.waits) <= max(stock.waits)


@pytest.mark.parametrize("seed", range(4))
def test_one_group_is_vllms_scheduler_step_for_step(vllm_config: VllmConfig, seed: int) -> None:
    trace = arrivals(seed, 60)
    policy = ("fcfs", "priority")[seed % 2]
    ours = run(make(vllm_config, 1, blocks=30, policy=policy), trace)
    stock = run(make(vllm_config, None, blocks=30, policy=policy), trace)
    assert stock.preempted > 0
    assert stock.cached > 0
    assert dataclasses.asdict(ours) == dataclasses.asdict(stock)


@pytest.fixture
def two(vllm_config: VllmConfig) -> GroupScheduler:
    return make(vllm_config, 2, blocks=200)


def finish(scheduler: GroupScheduler) -> None:
    while scheduler.has_requests():
        step(scheduler)


PROMPT = list(range(40))


def with_prompt_in(scheduler: GroupScheduler) -> int:
    """Let a group's cache hold PROMPT, and not that of the first one, which wins ties; which."""
    scheduler.add_request(request("other", [60] * 50, 2))
    scheduler.add_request(request("first", PROMPT, 2))
    at = group_of(scheduler, "first")
    finish(scheduler)
    assert at == 1
    return at


def test_an_idle_group_that_has_the_prefix_is_preferred(two: GroupScheduler) -> None:
    at = with_prompt_in(two)
    for name in ("a", "b"):
        two.add_request(request(name, [*PROMPT, 1, 2], 2))
        assert group_of(two, name) == at
        finish(two)


def test_the_prefix_is_given_up_when_its_group_is_busy(two: GroupScheduler) -> None:
    at = with_prompt_in(two)
    two.add_request(request("long", [*PROMPT, *range(41, 49), *range(40)], 2))
    assert group_of(two, "long") == at
    two.add_request(request("again", [*PROMPT, 1, 2], 2))
    assert group_of(two, "again") == 1 - at


def test_the_prefix_is_given_up_when_its_group_has_many_more_requests(two: GroupScheduler) -> None:
    at = with_prompt_in(two)
    where = []
    for i in range(2 * CLOSE + 4):
        two.add_request(request(f"r{i}", [*PROMPT, i], 60))
        where.append(group_of(two, f"r{i}"))
        step(two)
    assert where[: CLOSE + 1] == [at] * (CLOSE + 1)
    assert 1 - at in where


def test_ties_are_decided_by_requests_in_flight(two: GroupScheduler) -> None:
    two.add_request(request("a", [1, 2, 3], 20))
    first = group_of(two, "a")
    step(two)  # it decodes now: no group has anything to prefill
    two.add_request(request("b", [9, 8, 7], 20))
    assert group_of(two, "b") == 1 - first


def test_least_pending_tokens_first(two: GroupScheduler) -> None:
    two.add_request(request("long", list(range(90)), 2))
    for name in ("a", "b", "c"):
        two.add_request(request(name, [ord(name)] * 9, 2))
    assert len({group_of(two, name) for name in ("a", "b", "c")} | {group_of(two, "long")}) == 2
    assert {group_of(two, name) for name in ("a", "b", "c")} == {1 - group_of(two, "long")}


def test_aborts_go_to_the_group_that_has_the_request(two: GroupScheduler) -> None:
    for i in range(4):
        two.add_request(request(f"r{i}", [i] * 9, 9))
    step(two)
    assert [each.request_id for each in two.finish_requests("r2", RequestStatus.FINISHED_ABORTED)] == ["r2"]
    assert two.finish_requests(["r2", "unknown"], RequestStatus.FINISHED_ABORTED) == []
    output, _ = step(two)
    assert sum("r2" in own.finished_req_ids for own in by_group(output)) == 1
    assert len(two.finish_requests(None, RequestStatus.FINISHED_ABORTED)) == 3
    finish(two)
    assert two.get_num_unfinished_requests() == 0


def test_stats_are_those_of_all_groups(two: GroupScheduler) -> None:
    for i in range(5):
        two.add_request(request(f"r{i}", [i] * 9, 9))
    output = two.schedule()
    found = two.update_from_output(output, answers(two, output))
    (stats,) = [each.scheduler_stats for each in found.values() if each.scheduler_stats]
    assert (stats.num_running_reqs, stats.num_waiting_reqs) == two.get_request_counts() == (5, 0)
    assert stats.prefix_cache_stats.requests == 5
    usage = [group.get_kv_cache_usage() for group in two.groups]
    assert stats.kv_cache_usage == two.get_kv_cache_usage() == sum(usage) / 2 > 0


def test_pausing_and_resetting_the_cache_reach_all_groups(two: GroupScheduler) -> None:
    at = with_prompt_in(two)
    asked = request("probe", [*PROMPT, 1])
    assert cached_prefix(two.groups[at], asked) == len(PROMPT)
    for i in range(4):
        two.add_request(request(f"r{i}", [i] * 9, 9))
    two.set_pause_state(PauseState.PAUSED_ALL)
    assert step(two)[0].total_num_scheduled_tokens == 0
    two.set_pause_state(PauseState.UNPAUSED)
    step(two)
    assert not two.reset_prefix_cache()
    assert two.reset_prefix_cache(reset_running_requests=True)
    assert cached_prefix(two.groups[at], asked) == 0
    finish(two)
    assert free(two) == free(two)[:1] * 2


def test_prompt_logprobs_are_announced_while_the_prompt_is_computed(two: GroupScheduler) -> None:
    two.add_request(request("a", list(range(40)), 4, sampling={"prompt_logprobs": 1}))
    flags = [step(two)[0].step.prompt_logprobs for _ in range(4)]
    assert flags == [True, True, False, False]


def test_cache_tokens_that_groups_win() -> None:
    def saved(heads: int, tp: int, groups: int) -> float:
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=heads * groups // tp, head_size=8, dtype=torch.float32
        )
        config = KVCacheConfig(
            num_blocks=1, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)]
        )
        return bytes_saved(config, tp, groups)

    assert saved(1, 2, 2) == saved(2, 4, 2) == saved(1, 8, 8) == 1
    assert saved(2, 2, 2) == saved(8, 8, 2) / 1 == 2
