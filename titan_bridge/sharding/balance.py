"""Which replica sends: equal loads, deterministically.

Greedy in bulk. Copies of the same size that any replica of one shard can send are dealt out together, by
filling the least loaded replicas up to a common level, as water does; large ones first.
"""

from __future__ import annotations

import numpy as np


def fill(loads: np.ndarray, items: np.ndarray, size: np.ndarray) -> np.ndarray:
    """How many of `items[c]` copies of `size[c]` bytes each bin of row c takes, so that the fullest stays
    lowest.

    Args:
        loads: [rows, bins] bytes in each bin already; a very large number closes a bin.
        items: [rows] copies to deal out.
        size: [rows] bytes of each, at least 1.

    Returns:
        [rows, bins] copies; sums to `items` along the bins. Equal to dealing one copy at a time to the least
        loaded bin, up to ties.
    """
    bins = loads.shape[1]
    ordered = np.sort(loads, axis=1)
    filled = np.arange(1, bins + 1)
    # Level of the water if the k least loaded bins share it; the right k is the largest whose own floor is
    # under it. In floats, because closed bins would overflow; only the choice of k depends on it.
    level = (items[:, None] * size[:, None] + np.cumsum(ordered.astype(np.float64), axis=1)) / filled
    k = np.maximum((level > ordered).sum(axis=1), 1)
    total = np.cumsum(np.where(filled <= k[:, None], ordered, 0), axis=1)[:, -1]
    water = (items * size + total) // k
    count = np.maximum((water[:, None] - loads) // size[:, None], 0)
    # What is left over is less than one copy for each filled bin: to those that are then least loaded.
    left = items - count.sum(axis=1)
    rank = np.argsort(np.argsort(loads + count * size[:, None], axis=1, kind="stable"), axis=1, kind="stable")
    count += rank < left[:, None]
    assert (count.sum(axis=1) == items).all(), "copies lost while balancing"
    return count


def deal(
    loads: np.ndarray,
    senders: np.ndarray,
    shard: np.ndarray,
    size: np.ndarray,
    wanted: np.ndarray,
) -> np.ndarray:
    """Choose a replica for every copy and add the bytes to `loads`.

    Args:
        loads: [holders] bytes that each holder sends so far; changed in place.
        senders: [shards, replicas] holders of each source shard, -1 where there are fewer.
        shard: [pairs] the source shard of each pair of shards.
        size: [pairs] bytes of one copy of the pair.
        wanted: [pairs, copies] False where nothing has to be sent (no such destination, or it has the data).

    Returns:
        int16 [pairs, copies]: which replica sends (0 where nothing is wanted).
    """
    choice = np.zeros(wanted.shape, dtype=np.int16)
    if not len(shard) or not wanted.shape[1]:
        return choice
    order = np.lexsort((-size, shard))
    ordered_shard, ordered_size = shard[order], size[order]
    new_shard = np.r_[True, ordered_shard[1:] != ordered_shard[:-1]]
    new_run = new_shard | np.r_[True, ordered_size[1:] != ordered_size[:-1]]
    run = np.cumsum(new_run) - 1
    run_first = np.flatnonzero(new_run)
    run_shard, run_size = ordered_shard[run_first], ordered_size[run_first]
    # The n-th run of every shard is dealt out in round n.
    first_of_shard = np.maximum.accumulate(np.where(new_shard[run_first], np.arange(len(run_first)), 0))
    turn = np.arange(len(run_first)) - first_of_shard
    items = np.zeros(len(run_first), dtype=np.int64)
    np.add.at(items, run, wanted[order].sum(axis=1))
    closed = np.int64(1) << 62
    for n in range(int(turn.max()) + 1):
        runs = np.flatnonzero((turn == n) & (items > 0) & (run_size > 0))
        if not len(runs):
            continue
        who = senders[run_shard[runs]]
        open_ = who >= 0
        count = fill(np.where(open_, loads[who], closed), items[runs], run_size[runs])
        np.add.at(loads, who[open_], (count * run_size[runs, None])[open_])
        sequence = np.repeat(np.tile(np.arange(who.shape[1], dtype=np.int16), len(runs)), count.ravel())
        mine = np.zeros(len(run_first), dtype=bool)
        mine[runs] = True
        pairs = order[mine[run]]
        part = choice[pairs]
        part[wanted[pairs]] = sequence
        choice[pairs] = part
    return choice
