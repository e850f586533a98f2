"""Which rows of the residual stream belong to which group, and how rows come together.

Shape suffixes: B = 1, T = tokens of this rank's group, A = tokens of all groups, R and S the same of rows that go
through the head, D = width of the stream, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from vllm.distributed import get_tp_group


class GroupRows:
    """The step's state on one rank. Outside of a step, as in warm-up, every group has as many tokens as this one."""

    def __init__(self, groups: int) -> None:
        tp = get_tp_group()
        self._tp, self._groups = tp, groups
        self._width = tp.world_size // groups
        self.group = tp.rank_in_group // self._width
        self.speaks = tp.rank_in_group % self._width == 0
        """Whether this rank answers for its group."""
        self._tokens: list[int] | None = None
        self._head: list[int] | None = None
        self._asked = False
        self._announced: list[int] = []
        self.idle = False
        """Whether this rank's group has no work in the step."""

    def begin(self, tokens: Sequence[int], head: Sequence[int]) -> None:
        """A step of so many tokens of each group, of which so many rows go through the head first of all.

        A group without a token brings one, which means nothing: ranks run something in any case.
        """
        self.idle = not tokens[self.group]
        self._tokens, self._head = [max(count, 1) for count in tokens], list(head)

    def end(self) -> None:
        """The step is over."""
        self._tokens = self._head = None
        self._asked = self.idle = False

    def all_ids(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Token ids of all groups, `(A,)`, from those of the own one."""
        # As floats, bit for bit: shared memory on CPUs gathers no integers.
        bits_T = ids_T.to(torch.int32).view(torch.float32)
        return self._together(bits_T, self._counts(len(ids_T))).view(torch.int32).to(ids_T.dtype)

    def own(self, x_AD: torch.Tensor, *, dim: int = 0) -> torch.Tensor:
        """This group's rows, as a view."""
        start, count = self._place(x_AD.shape[dim])
        return x_AD.narrow(dim, start, count)

    def merged(self, part_BTD: torch.Tensor | None, like_BAD: torch.Tensor) -> torch.Tensor:
        """Every group's rows on every rank, from this rank's partial sum of its own group's rows; None: all zero."""
        sum_BAD = torch.zeros_like(like_BAD)
        if part_BTD is not None:
            self.own(sum_BAD, dim=1).copy_(part_BTD)
        return self._tp.all_reduce(sum_BAD.flatten(end_dim=-2)).view_as(like_BAD)

    def through_head(self, x_RD: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`head`, which all ranks compute together, of this group's rows: `(R, D)` to `(R, V)`.

        The first call of a step has the rows that `begin` was told; further ones, for the log-probabilities of
        prompts, come as they come, so the ranks tell each other how many rows they have; see `others_ask`.
        """
        if self._tokens is None:
            counts = [len(x_RD)] * self._groups
        elif self._head is not None:
            counts, self._head = self._head, None
        else:
            counts = self._announced if self._asked else self._announce(len(x_RD))
            self._asked = False
        assert counts[self.group] == len(x_RD)
        logits_SV = head(self._together(x_RD, counts))
        start = sum(counts[: self.group])
        return logits_SV[start : start + len(x_RD)]

    def others_ask(self) -> bool:
        """Whether another group still has rows for the head; this rank has none, and then calls it without any."""
        self._announced = self._announce(0)
        self._asked = any(self._announced)
        return self._asked

    def _announce(self, count: int) -> list[int]:
        mine = torch.tensor([count])
        counts = [torch.empty_like(mine) for _ in range(self._tp.world_size)]
        dist.all_gather(counts, mine, group=self._tp.cpu_group)
        return [int(each) for each in counts[:: self._width]]

    def _counts(self, own: int) -> list[int]:
        counts = self._tokens or [own] * self._groups
        assert counts[self.group] == own, (
            f"a step of {counts} tokens by group, but group {self.group} runs {own}"
        )
        return counts

    def _place(self, total: int) -> tuple[int, int]:
        counts = self._tokens or [total // self._groups] * self._groups
        return sum(counts[: self.group]), counts[self.group]

    def _together(self, x_T: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Rows of all groups in order, of which the own one has `x_T`; the first dim is that of rows."""
        longest = max(counts)
        if not longest:
            return x_T
        padded = F.pad(x_T, (0,) * (2 * x_T.dim() - 1) + (longest - len(x_T),))
        slots = self._tp.all_gather(padded.contiguous(), 0).unflatten(0, (-1, longest))[:: self._width]
        return torch.cat([slot[:count] for slot, count in zip(slots, counts, strict=True)])


def group_attention(model: nn.Module, rows: GroupRows) -> None:
    """Let every attention of `model` run on its group's rows, and add the groups up, in place.

    Its own boundary must have been left out (`lower(..., merges=...)`), so that it gives partial sums.
    """
    layers: Any = model.layers
    for layer in layers.values():
        layer.attention.forward = _on_own_rows(layer.attention.forward, rows)


def _on_own_rows(forward: Callable[..., torch.Tensor], rows: GroupRows) -> Callable[..., torch.Tensor]:
    def grouped(x_BAD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        part = None if rows.idle else forward(rows.own(x_BAD, dim=1), *args, **kwargs)
        return rows.merged(part, x_BAD)

    return grouped
