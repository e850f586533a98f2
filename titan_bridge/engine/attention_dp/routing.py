"""Which group gets a new request; it stays there until it ends."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

CLOSE = 4
"""A group with this many more requests in flight than the emptiest is as loaded as that one; so is one with a quarter
more. Beyond it a cached prefix is worth nothing: else one long prompt that all share would draw all requests."""


def best_group(request: Request, groups: Sequence[Scheduler], cached: MutableMapping[Request, int]) -> int:
    """The group that has the fewest tokens to prefill with `request`, not counting what its cache holds of it.

    Of equal ones it is that with the fewest requests in flight, then that with the longest cached prefix, then the
    first. `cached` is what was found for requests that have not started, and gets that of this one.
    """
    flying = [sum(group.get_request_counts()) for group in groups]
    close = min(flying) + max(CLOSE, min(flying) // 4)
    found = [
        cached_prefix(group, request) if count <= close else 0
        for group, count in zip(groups, flying, strict=True)
    ]
    costs = [
        (pending_tokens(group, cached) + request.num_tokens - hit, count, -hit, at)
        for at, (group, count, hit) in enumerate(zip(groups, flying, found, strict=True))
    ]
    best = min(costs)[-1]
    cached[request] = found[best]
    return best


def cached_prefix(group: Scheduler, request: Request) -> int:
    """Tokens of a new request that a group's cache holds; asking leaves no trace in vLLM's statistics."""
    manager = group.kv_cache_manager
    if not manager.prefix_cache_lookup_enabled(request):
        return 0
    return manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)[1]


def pending_tokens(group: Scheduler, cached: MutableMapping[Request, int]) -> int:
    """Tokens that a group has still to prefill: of prompts, and of requests that were preempted."""
    pending = 0
    for request in group.requests.values():
        left = request.num_tokens - request.num_computed_tokens
        if left > 1 or request.num_computed_tokens < request.num_prompt_tokens:  # else it decodes
            pending += left - (cached.get(request, 0) if not request.num_computed_tokens else 0)
    return pending
